"""One HTTP request's generations: started together, read together, aborted together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from starlette.requests import Request

from treadle.errors import InvalidRequest, Overloaded, TreadleError
from treadle.frontend import Frontend
from treadle.outputs import RequestOutput
from treadle.stream import Stream
from treadle.transport.messages import SamplingParams
from treadle.transport.params import MAX_TRACE_CONTEXT

from .errors import ApiError, ClientGone
from .metrics import Meter, Metrics


class News(NamedTuple):
    """What came for one prompt. prompt: its place in the request."""

    prompt: int
    output: RequestOutput


class Exchange:
    """Made before anything is generated, `close`d in the end whatever happened.

    The tenant is that of the request's API key. model: the name under which it is counted. limit: of open requests.
    guided: see `from_treadle`.
    While it is open it watches the connection: a client that goes aborts its generations at once.
    """

    def __init__(self, request: Request, metrics: Metrics, model: str, limit: int) -> None:
        if metrics.open_requests >= limit:
            raise ApiError(
                429, f"{limit} requests are open here, which is the limit", type="rate_limit_error", retry_after=1
            )
        self._metrics = metrics
        self._model = model
        self._tenant = str(request.state.tenant)
        self.guided = str(request.state.guided)
        self._trace_headers = _trace_context(request)
        self._began = time.perf_counter()
        self._streams: list[Stream] = []
        self._meters: list[Meter] = []
        self._closed = False
        self.gone = False
        metrics.opened()
        self._watch = asyncio.get_running_loop().create_task(_disconnected(request))
        self._watch.add_done_callback(self._leave)

    def start(
        self,
        frontend: Frontend,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        priority: int | None,
        cache_salt: str | None,
    ) -> None:
        """Raises TreadleError for what can be judged at once; the rest is raised by the first reading."""
        if self.gone:
            raise ClientGone
        for prompt in prompts:
            self._meters.append(self._metrics.request(self._model, params, self._began))
            try:
                stream = frontend.generate(
                    prompt,
                    params,
                    priority=priority or 0,
                    cache_salt=cache_salt or "",
                    trace_headers=self._trace_headers,
                    tenant=self._tenant,
                )
            except TreadleError as error:
                self._failed(error)
                raise
            self._streams.append(stream)

    async def finals(self) -> list[RequestOutput]:
        """The whole of every prompt, in order. Raises TreadleError, and ClientGone."""
        try:
            outputs = await asyncio.gather(*(stream.final() for stream in self._streams))
        except TreadleError as error:
            self._failed(error)
            raise
        if self.gone:
            raise ClientGone
        for meter, output in zip(self._meters, outputs, strict=True):
            meter.saw(output)
        return outputs

    async def news(self) -> AsyncIterator[News]:
        """All prompts as they come, until all have ended. Raises TreadleError, and ClientGone."""
        try:
            if len(self._streams) == 1:  # nearly always: without the tasks that reading several needs
                async for output in self._streams[0]:
                    if self.gone:
                        break
                    self._meters[0].saw(output)
                    yield News(0, output)
            else:
                async for prompt, output in _merged(self._streams):
                    if self.gone:
                        break
                    self._meters[prompt].saw(output)
                    yield News(prompt, output)
        except TreadleError as error:
            self._failed(error)
            raise
        if self.gone:
            raise ClientGone

    def close(self) -> None:
        """Aborts what still runs. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        for stream in self._streams:
            stream.abort()
        for meter in self._meters:
            meter.end()
        self._metrics.closed()

    def _failed(self, error: TreadleError) -> None:
        refused = isinstance(error, InvalidRequest | Overloaded)
        for meter in self._meters:
            meter.drop() if refused else meter.fail()

    def _leave(self, watch: asyncio.Task[None]) -> None:
        if watch.cancelled():
            return
        watch.exception()
        self.gone = True
        self._metrics.disconnects.inc()
        for stream in self._streams:
            stream.abort()


def _trace_context(request: Request) -> dict[str, str]:
    """Of the caller's span. What is too long to be one is left out, as W3C's Trace Context asks."""
    values = {name: ",".join(request.headers.getlist(name)) for name in ("traceparent", "tracestate")}
    return {name: value for name, value in values.items() if 0 < len(value) <= MAX_TRACE_CONTEXT}


async def _disconnected(request: Request) -> None:
    """Ends when the client has closed the connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    waiting = {asyncio.ensure_future(_next(stream)): place for place, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place, news = waiting.pop(task), task.result()
                if news is not None:
                    waiting[asyncio.ensure_future(_next(streams[place]))] = place
                    yield place, news
    finally:
        for task in waiting:
            if not task.cancel() and not task.cancelled():
                task.exception()  # several may have failed at once, and the first has said why


async def _next(stream: Stream) -> RequestOutput | None:
    return await anext(stream, None)
