"""The service on a loop thread of this process: what `LLM` uses by default."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import TypeVar

from treadle.errors import ServiceClosed, ServiceError, TreadleError
from treadle.scheduler.delivery import Sink, refusal
from treadle.scheduler.options import ModelFacts, ServiceOptions
from treadle.scheduler.policies import Policy
from treadle.scheduler.service import Service
from treadle.transport.messages import (
    Abort,
    Deltas,
    InfoRequest,
    Refused,
    ServiceMessage,
    Submit,
    Timeline,
    TokenizerInfo,
)

from .loop_thread import LoopThread
from .stream import Stream, StreamTable

logger = logging.getLogger("treadle")
T = TypeVar("T")


class EmbeddedBackend:
    """Starts and owns the thread. `submit` works on any running loop of any thread; `abort` from anywhere.

    The scheduler has a thread and a loop of its own, so a program that blocks its loop does not stall the engines.
    """

    def __init__(
        self,
        facts: ModelFacts,
        options: ServiceOptions,
        tokenizer_info: Callable[[], TokenizerInfo | None],
        policy: Policy | None = None,
    ) -> None:
        self._facts = facts
        self._options = options
        self._policy = policy
        self._tokenizer_info = tokenizer_info
        self._thread: LoopThread | None = None
        self._service: Service | None = None
        self._sessions: dict[asyncio.AbstractEventLoop, _LoopSink] = {}
        self._closing: asyncio.Future[None] | None = None
        self._lock = threading.RLock()  # dropping a stream calls `abort`, and that may happen anywhere

    @property
    def engine_pids(self) -> list[int]:
        return self._service.engine_pids if self._service is not None else []

    async def start(self) -> None:
        if self._thread is not None:
            raise ServiceError("already started")
        self._thread = LoopThread("treadle-scheduler")
        self._service = Service(self._facts, self._options, self._tokenizer_info, policy=self._policy)
        try:
            await self._thread.submit(self._service.start())
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Safe to call twice; being cancelled does not cut it short, only the waiting for it."""
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        with self._lock:  # what was submitted until here is on its way, and ends below; nothing comes after it
            thread, self._thread = self._thread, None
        if thread is None or self._service is None:
            return
        try:
            await thread.submit(self._service.close())
        finally:
            for sink in list(self._sessions.values()):
                sink.end()
            self._sessions.clear()
            thread.close()

    def submit(self, message: Submit, stream: Stream) -> None:
        with self._lock:
            thread, service = self._running()
            sink = self._sink(asyncio.get_running_loop())
            sink.streams.add(stream)
            thread.loop.call_soon_threadsafe(_submit, service, message, sink)

    def abort(self, message: Abort) -> None:
        with self._lock:
            thread, service = self._thread, self._service
            if thread is not None and service is not None:
                thread.loop.call_soon_threadsafe(self._abort_everywhere, service, message)

    async def info(self, kind: str) -> ServiceMessage:
        return await self._ask(lambda service: _answer(service, InfoRequest("", kind)))

    async def record(self, seconds: float) -> Timeline:
        return await self._ask(lambda service: service.record(seconds))

    async def _ask(self, work: Callable[[Service], Coroutine[None, None, T]]) -> T:
        """Raises ServiceClosed where `close` comes before the answer."""
        with self._lock:
            thread, service = self._running()
            asked = thread.submit(work(service))
        try:
            return await asked
        except asyncio.CancelledError:
            if asked.cancelled() and self._thread is None and not _is_cancelled():
                raise ServiceClosed("the service was closed") from None
            raise

    def _abort_everywhere(self, service: Service, message: Abort) -> None:
        for sink in list(self._sessions.values()):
            if message.id in sink.open:
                service.abort(message, sink)

    def _running(self) -> tuple[LoopThread, Service]:
        if self._thread is None or self._service is None:
            raise ServiceClosed("the service is not running")
        return self._thread, self._service

    def _sink(self, loop: asyncio.AbstractEventLoop) -> _LoopSink:
        """Under the lock."""
        for known in [other for other in self._sessions if other.is_closed()]:
            del self._sessions[known]
        sink = self._sessions.get(loop)
        if sink is None:
            sink = self._sessions[loop] = _LoopSink(f"loop-{id(loop):x}", loop, self._lost)
        return sink

    def _lost(self, sink: _LoopSink) -> None:
        """The program's loop was closed with requests open."""
        if self._service is not None:
            self._service.detach(sink)


class _LoopSink(Sink):
    """Brings deltas to the streams of one event loop: one wake-up of it per step, whatever the number of rows."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, lost: Callable[[_LoopSink], None]) -> None:
        super().__init__(name)
        self.streams = StreamTable()
        self._loop = loop
        self._lost = lost

    def flush(self) -> None:
        self._call(self.streams.receive, self.take())

    def refuse(self, refused: Refused) -> None:
        self._call(self.streams.refuse, refused)

    def end(self) -> None:
        self._call(self.streams.fail_all, ServiceClosed("the service was closed"))

    def _call(self, function: Callable[..., None], argument: Deltas | Refused | TreadleError) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:  # that loop is closed; nobody will read
            if self.open:
                asyncio.get_running_loop().call_soon(self._lost, self)


def _submit(service: Service, message: Submit, sink: _LoopSink) -> None:
    try:
        service.submit(message, sink)
    except Exception as error:  # one request must not reach the others, whatever it did
        if not isinstance(error, TreadleError):
            logger.exception("a request raised")
        sink.refuse(refusal(message.id, error))


def _is_cancelled() -> bool:
    """Whether somebody wants the running task to end, rather than what it waits for has ended."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _answer(service: Service, request: InfoRequest) -> ServiceMessage:
    return service.answer(request)
