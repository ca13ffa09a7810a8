"""An embedded service is closed by one thread while others use it: typed errors, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import pytest_asyncio

from treadle import embedded
from treadle.embedded import EmbeddedBackend
from treadle.errors import ServiceClosed
from treadle.loop_thread import LoopThread
from treadle.scheduler.delivery import Sink
from treadle.scheduler.options import service_options
from treadle.stream import Stream
from treadle.transport.codec import pack
from treadle.transport.messages import Abort, InfoRequest, SamplingParams, Stats, Submit

from .faultkit import FACTS


class Quiet:
    """A service that takes everything and ends nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        self.recording = threading.Event()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def submit(self, message: Submit, sink: Sink) -> None:
        sink.open[message.id] = 1

    def abort(self, message: Abort, sink: Sink) -> None: ...

    def answer(self, request: InfoRequest) -> Stats:
        return Stats(id=request.id)

    async def record(self, seconds: float) -> Any:
        self.recording.set()
        await asyncio.Event().wait()


class Pausing:
    """A loop thread: whoever first reaches for it stands still until `close` has ended on another thread, or waits."""

    def __init__(self, real: LoopThread, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._real = real
        self._decided = threading.Event()
        self._closer = threading.Thread(target=self._run, args=[close])
        self._begun = False
        self._lock = threading.RLock()

    def _run(self, close: Callable[[], Coroutine[Any, Any, None]]) -> None:
        asyncio.run(close())
        self._decided.set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        self._pause()
        return self._real.loop

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        self._pause()
        return self._real.submit(coroutine)

    def close(self) -> None:
        self._real.close()

    def join(self) -> None:
        self._closer.join()

    def _pause(self) -> None:
        if not self._begun:
            self._begun = True
            self._closer.start()
            self._decided.wait()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._decided.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest_asyncio.fixture
async def backend(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedBackend]:
    monkeypatch.setattr(embedded, "Service", Quiet)
    made = EmbeddedBackend(FACTS, service_options(), lambda: None)
    await made.start()
    yield made
    await asyncio.to_thread(lambda: asyncio.run(made.close()) if made._thread is not None else None)


def pausing(backend: EmbeddedBackend) -> Pausing:
    assert backend._thread is not None
    hook = Pausing(backend._thread, backend.close)
    backend._thread = backend._lock = hook  # type: ignore[assignment]
    return hook


def request(backend: EmbeddedBackend) -> tuple[Submit, Stream]:
    message = Submit(id="a", tokens=pack([1]), params=SamplingParams())
    return message, Stream(message, "a", None, None, (), backend.abort)


@pytest.mark.asyncio
async def test_a_request_that_meets_the_end(backend: EmbeddedBackend) -> None:
    hook = pausing(backend)
    message, stream = request(backend)
    backend.submit(message, stream)
    async with asyncio.timeout(10):
        with pytest.raises(ServiceClosed):
            await stream.final()
    hook.join()
    with pytest.raises(ServiceClosed):
        backend.submit(message, stream)


@pytest.mark.asyncio
async def test_an_abort_that_meets_the_end_is_no_error(backend: EmbeddedBackend) -> None:
    hook = pausing(backend)
    backend.abort(Abort("a"))
    hook.join()
    backend.abort(Abort("a"))


@pytest.mark.asyncio
async def test_a_question_that_meets_the_end(backend: EmbeddedBackend) -> None:
    hook = pausing(backend)
    async with asyncio.timeout(10):
        answer = await asyncio.gather(backend.info("stats"), return_exceptions=True)
    assert isinstance(answer[0], Stats | ServiceClosed)
    hook.join()


@pytest.mark.asyncio
async def test_what_is_open_at_the_end_is_closed_and_not_cancelled(backend: EmbeddedBackend) -> None:
    """Nobody has cancelled the task that waits; where somebody does, that is what it gets."""
    service = backend._service
    assert isinstance(service, Quiet)
    waiting = [asyncio.create_task(backend.record(1.0)) for _ in range(2)]
    await asyncio.to_thread(service.recording.wait)
    waiting[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[1]
    await backend.close()
    with pytest.raises(ServiceClosed):
        await waiting[0]
