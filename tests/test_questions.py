"""Questions to a server that is replaced while they are open: each is answered or ends, none waits for ever."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
import pytest_asyncio
import zmq

from treadle import remote
from treadle.errors import Overloaded, ProtocolError, ServerLost, TreadleError
from treadle.remote import RemoteBackend
from treadle.scheduler.delivery import refusal
from treadle.stream import Stream
from treadle.transport.channel import Channel
from treadle.transport.codec import pack, service_codec
from treadle.transport.endpoints import bind_server
from treadle.transport.messages import (
    Delta,
    Drain,
    InfoRequest,
    Message,
    Ping,
    Pong,
    Record,
    Reload,
    SamplingParams,
    Stats,
    Submit,
)
from treadle.transport.sockets import service_socket

AnyMessage = TypeVar("AnyMessage", bound=Message)


class Oracle:
    """The wire's end of a server, which says and forgets what the test has it say and forget."""

    def __init__(self, endpoint: str) -> None:
        self.incarnation, self.received = "first", 0
        self.pongs, self.answers = True, False
        self.refuses: TreadleError | None = None
        self.full: Overloaded | None = None
        self._codec = service_codec()
        self._heard: list[Message] = []
        self._news = asyncio.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = service_socket(self._context, 100)
        bind_server(socket, endpoint, None)
        self._channel = Channel(socket, self._receive)

    def _receive(self, frames: list[bytes]) -> None:
        message = self._codec.decode(frames[1])
        self._heard.append(message)
        self._news.set()
        if self.full is not None:
            self._say(frames[0], refusal("", self.full))
            return
        self.received += 1
        if isinstance(message, Ping) and self.pongs:
            self._say(frames[0], Pong(message.nonce, self.incarnation, self.received))
        elif self.refuses is not None:
            self._say(frames[0], refusal("", self.refuses))
        elif isinstance(message, InfoRequest) and self.answers:
            self._say(frames[0], Stats(id=message.id, step=7))

    def _say(self, identity: bytes, message: Message) -> None:
        with suppress(zmq.ZMQError):  # its last ping: it is closed
            self._channel.send([identity, self._codec.encode(message)])

    def restart(self) -> None:
        self.incarnation, self.received = "second", 0
        self.pongs = self.answers = True
        self.full = None
        self._heard.clear()

    async def heard(self, kind: type[AnyMessage], times: int = 1) -> list[AnyMessage]:
        """Waits for that many, since the last restart, and returns them."""
        async with asyncio.timeout(10):
            while len(found := [message for message in self._heard if isinstance(message, kind)]) < times:
                self._news.clear()
                await self._news.wait()
        return found

    def close(self) -> None:
        self._channel.close()
        self._context.term()


@pytest_asyncio.fixture
async def place(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Oracle, RemoteBackend]]:
    monkeypatch.setattr(remote, "_PING_SECONDS", 0.02)
    with tempfile.TemporaryDirectory() as directory:
        endpoint = f"ipc://{Path(directory) / 's'}"
        oracle = Oracle(endpoint)
        backend = RemoteBackend(endpoint, None, connect_timeout=30.0, lost_after=30.0)
        yield oracle, backend
        await backend.close()
        oracle.close()


@pytest.mark.asyncio
async def test_a_question_that_only_reads_is_asked_again(place: tuple[Oracle, RemoteBackend]) -> None:
    oracle, backend = place
    await backend.start()
    asked = asyncio.create_task(backend.info("stats"))
    await oracle.heard(Ping)
    await oracle.heard(InfoRequest)
    oracle.restart()
    async with asyncio.timeout(10):
        answer = await asked
    assert isinstance(answer, Stats) and answer.step == 7


@pytest.mark.asyncio
async def test_an_order_that_was_on_its_way_ends_with_server_lost(place: tuple[Oracle, RemoteBackend]) -> None:
    """It may have been carried out, so it is not given a second time."""
    oracle, backend = place
    await backend.start()
    orders = [backend.control(Drain("d", 1.0)), backend.control(Reload("r", "/model")), backend.record(1.0)]
    waiting = [asyncio.create_task(order) for order in orders]
    await oracle.heard(Ping)
    await oracle.heard(Record)
    oracle.restart()
    async with asyncio.timeout(10):
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [ServerLost] * 3
    assert all("not known" in str(end) for end in ends)


@pytest.mark.asyncio
async def test_a_server_that_ends_before_it_has_ever_answered(place: tuple[Oracle, RemoteBackend]) -> None:
    """The other is the first that the client hears of; it has not received what the client has sent."""
    oracle, backend = place
    oracle.pongs = False
    await backend.start()
    message = Submit(id="a", tokens=pack([1]), params=SamplingParams())
    stream = Stream(message, "a", None, None, (), backend.abort)
    backend.submit(message, stream)
    await oracle.heard(Ping)
    await oracle.heard(Submit)
    oracle.restart()
    async with asyncio.timeout(10):
        with pytest.raises(ServerLost):
            await stream.final()


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [Overloaded("10,000 clients", 15.0), ProtocolError("no such message")])
async def test_a_refusal_of_nobody_knows_what_ends_what_is_open(
    place: tuple[Oracle, RemoteBackend], error: TreadleError
) -> None:
    """As of a server that is full, or of another version: it has not read what it was asked."""
    oracle, backend = place
    oracle.refuses = error
    await backend.start()
    for order in (backend.control(Drain("d", 1.0)), backend.info("stats")):
        with pytest.raises(type(error), match=str(error)):
            async with asyncio.timeout(10):
                await order


@pytest_asyncio.fixture
async def lasting(place: tuple[Oracle, RemoteBackend]) -> AsyncIterator[tuple[RemoteBackend, Stream]]:
    """Another backend at the same place, whose streams resume, and one of them. The oracle says no Pong."""
    place[0].pongs = False
    backend = RemoteBackend(place[1]._endpoint, None, 30.0, 30.0, resume_timeout=30.0)
    await backend.start()
    message = Submit(id="a", tokens=pack([1]), params=SamplingParams())
    stream = Stream(message, "a", None, None, (), backend.abort)
    backend.submit(message, stream)
    yield backend, stream
    await backend.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("known", [True, False])
async def test_a_stream_that_resumes_waits_until_a_full_server_has_room_for_its_client(
    place: tuple[Oracle, RemoteBackend], lasting: tuple[RemoteBackend, Stream], known: bool
) -> None:
    """It was dropped, while a network was away perhaps, and others came. known: the server had answered before."""
    oracle, stream = place[0], lasting[1]
    oracle.pongs = known
    (first,) = await oracle.heard(Submit)
    await oracle.heard(Ping, 2)
    stream.feed(Delta("a", 0, [5]))
    oracle.full = Overloaded("10,000 clients", 15.0)
    await oracle.heard(Ping, 7)
    assert not stream.ended
    oracle.restart()
    (again,) = await oracle.heard(Submit)
    assert (again.key, again.outputs) == (first.key, [pack([5])]) and again.id != first.id


@pytest.mark.asyncio
async def test_it_does_not_wait_for_ever(
    place: tuple[Oracle, RemoteBackend], lasting: tuple[RemoteBackend, Stream]
) -> None:
    oracle, (backend, stream) = place[0], lasting
    oracle.full = Overloaded("10,000 clients", 15.0)
    backend._full_since = -1e6
    async with asyncio.timeout(10):
        with pytest.raises(Overloaded, match="10,000 clients"):
            await stream.final()
