"""The reader's end of one request."""

from __future__ import annotations

import asyncio
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Sequence

import msgspec

from treadle.errors import DeadlineExceeded, ServiceClosed, TreadleError, from_wire
from treadle.tokenizer import Tokenizer
from treadle.transport.codec import pack, unpack
from treadle.transport.messages import Abort, Delta, Deltas, Refused, Submit

from .continuation import Continuation, logprob_table
from .outputs import Logprob, RequestOutput

_LEAST_TIMEOUT = 1e-3


class Stream:
    """An async iterator of `RequestOutput`; what comes while nobody reads is merged, so a slow reader costs no memory.

    Ends after the last output. Raises the request's typed error instead. Leaving it early, by `break` and
    `aclose`, by cancelling the task that reads, or by dropping it, aborts the request.
    """

    _ended = True  # nothing more will come, or we no longer care; true until __init__ has got through

    def __init__(
        self,
        submit: Submit,
        label: str,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        abort: Callable[[Abort], None],
    ) -> None:
        self.request_id = label
        self.wire_id = submit.id
        self.resumed = False
        self._submit = submit
        self._prompt = prompt
        self._prompt_ids: list[int] = unpack(submit.tokens).tolist()
        self._eos = eos_token_ids
        self._abort = abort
        self._parts = [Continuation(i, self._prompt_ids, submit.params, tokenizer) for i in range(submit.params.n)]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if submit.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]
        self._cached = 0
        self._arrival = time.perf_counter()
        self._first: float | None = None
        self._news = False
        self._readers: list[asyncio.Future[None]] = []
        self._error: TreadleError | None = None
        self._unread = False
        self._only_end = False
        self._exhausted = False
        self._ended = False

    # ── the service's side, on the reader's loop ──

    def feed(self, delta: Delta) -> None:
        """Takes a delta of this request."""
        if self._ended:
            return
        if delta.tokens and self._first is None:
            self._first = time.perf_counter()
        self._cached = max(self._cached, delta.cached_tokens)
        if self._prompt_logprobs is not None and delta.index == 0:
            self._prompt_logprobs += [logprob_table(entry) for entry in delta.prompt_logprobs]
        if delta.finish == "error":
            self.fail(from_wire(delta.error_code, delta.error))
            self._abort(Abort(self.wire_id))  # one continuation failed: the others have no reader any more
            return
        if not 0 <= delta.index < len(self._parts):
            return
        part = self._parts[delta.index]
        if part.feed(delta, self._eos):
            self._abort(Abort(self.wire_id, delta.index))
        if delta.finish == "deadline":
            self.fail(DeadlineExceeded(f"request {self.request_id} did not finish within its timeout"))
            return
        self._unread = True
        if part.finished:
            self._ended = all(other.finished for other in self._parts)
        if self._ended or not self._only_end:
            self._tell()

    def refuse(self, refused: Refused) -> None:
        self.fail(from_wire(refused.code, refused.message, refused.retry_after))

    def fail(self, error: TreadleError) -> None:
        """Ends the stream with `error`; what came before is still read first."""
        if not self._ended:
            self._error = error
            self._ended = True
            self._tell()

    def disown(self) -> None:
        """The request was never sent: dropping the stream must not abort another's."""
        self._ended = True

    @property
    def ended(self) -> bool:
        """Nothing more will be fed to this stream."""
        return self._ended

    def resubmission(self, wire_id: str) -> Submit:
        """The request as it stands now, for a server that does not know it. The stream has this id from now on."""
        self.wire_id = wire_id
        self.resumed = True
        timeout = self._submit.timeout
        if timeout:
            timeout = max(timeout - (time.perf_counter() - self._arrival), _LEAST_TIMEOUT)
        if self._prompt_logprobs is not None and not self._parts[0].tokens:
            self._prompt_logprobs = [None]  # the rest comes with the first token, from the beginning
        return msgspec.structs.replace(
            self._submit,
            id=wire_id,
            timeout=timeout,
            outputs=[pack(part.tokens) for part in self._parts],
            ended=[index for index, part in enumerate(self._parts) if part.finished],
        )

    def make_lasting(self, seed: int) -> Submit:
        """The request with a key, and a seed of the client's, so that every server draws the same tokens."""
        self._submit = msgspec.structs.replace(self._submit, key=uuid.uuid4().hex)
        if self._submit.params.seed is None:
            params = msgspec.structs.replace(self._submit.params, seed=seed)
            self._submit = msgspec.structs.replace(self._submit, params=params)
        return self._submit

    # ── the reader's side ──

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._exhausted:
            raise StopAsyncIteration
        if not self._news:
            reader: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._readers.append(reader)
            try:
                await reader
            except asyncio.CancelledError:
                self.abort()
                raise
        if self._error is not None and not self._unread:
            self._exhausted = True
            raise self._error
        if self._error is None:
            self._news = False
            self._exhausted = self._ended
        return self._read()

    async def final(self) -> RequestOutput:
        """Waits for the end and returns the whole. Cheaper than reading: the reader is not woken in between."""
        self._only_end = True
        last = None
        async for output in self:
            last = output
        if last is None:
            raise ServiceClosed(f"request {self.request_id} was read to its end before")
        return last

    def abort(self) -> None:
        """Ends the request now; reading on gives what there is, with finish_reason "abort"."""
        if not self._ended:
            self._ended = True
            for part in self._parts:
                if not part.finished:
                    part.finish_reason = "abort"
            self._tell()
            self._abort(Abort(self.wire_id))

    async def aclose(self) -> None:
        """Aborts the request if it still runs."""
        self.abort()
        self._exhausted = True

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._ended:
            self._abort(Abort(self.wire_id))

    def _tell(self) -> None:
        """There are news. What an `asyncio.Event` does, without its calls: it is done for every token of everybody."""
        self._news = True
        for reader in self._readers:
            if not reader.done():
                reader.set_result(None)
        self._readers.clear()

    def _read(self) -> RequestOutput:
        self._unread = False
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_ids,
            outputs=[part.read() for part in self._parts],
            finished=self._ended and self._error is None,
            cached_tokens=self._cached,
            prompt_logprobs=None if self._prompt_logprobs is None else self._prompt_logprobs.copy(),
            arrival_time=self._arrival,
            first_token_time=self._first,
        )


class StreamTable:
    """The open streams of one reader loop, by wire id, held weakly: a stream leaves when it ends or is dropped."""

    def __init__(self) -> None:
        self._streams: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, stream: Stream) -> None:
        self._streams[stream.wire_id] = stream

    def open(self) -> list[Stream]:
        return list(self._streams.values())

    def get(self, request_id: str) -> Stream | None:
        return self._streams.get(request_id)

    def discard(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def receive(self, news: Deltas) -> None:
        """What one step brought. A stream is in `tokens` or in `items`, not in both, so their order means nothing."""
        self.deliver(Delta(request_id, 0, [token]) for request_id, token in news.tokens.items())
        self.deliver(news.items)

    def deliver(self, items: Iterable[Delta]) -> None:
        for delta in items:
            stream = self._streams.get(delta.id)
            if stream is not None:
                stream.feed(delta)
                if stream.ended:
                    self.discard(delta.id)

    def refuse(self, refused: Refused) -> None:
        stream = self._streams.get(refused.id)
        if stream is not None:
            stream.refuse(refused)
            self.discard(refused.id)

    def fail_all(self, error: TreadleError) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        self._streams.clear()
