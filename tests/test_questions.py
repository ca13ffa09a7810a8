"""Questions to a server that is replaced while they are open: each is answered or ends, none waits for ever."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

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


class Oracle:
    """The wire's end of a server, which says and forgets what the test has it say and forget."""

    def __init__(self, endpoint: str) -> None:
        self.incarnation, self.received = "first", 0
        self.pongs, self.answers = True, False
        self.refuses: TreadleError | None = None
        self._codec = service_codec()
        self._heard: list[Message] = []
        self._news = asyncio.Event()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = service_socket(self._context, 100)
        bind_server(socket, endpoint, None)
        self._channel = Channel(socket, self._receive)

    def _receive(self, frames: list[bytes]) -> None:
        message = self._codec.decode(frames[1])
        self.received += 1
        self._heard.append(message)
        self._news.set()
        if isinstance(message, Ping) and self.pongs:
            self._say(frames[0], Pong(message.nonce, self.incarnation, self.received))
        elif self.refuses is not None:
            self._say(frames[0], refusal("", self.refuses))
        elif isinstance(message, InfoRequest) and self.answers:
            self._say(frames[0], Stats(id=message.id, step=7))

    def _say(self, identity: bytes, message: Message) -> None:
        self._channel.send([identity, self._codec.encode(message)])

    def restart(self) -> None:
        self.incarnation, self.received = "second", 0
        self.pongs = self.answers = True

    async def heard(self, kind: type[Message]) -> None:
        async with asyncio.timeout(10):
            while not any(isinstance(message, kind) for message in self._heard):
                self._news.clear()
                await self._news.wait()

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
