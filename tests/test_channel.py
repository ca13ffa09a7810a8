"""One socket on a loop: no message is left lying when the edge has passed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from treadle.transport.channel import Channel


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    made: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield made
    made.destroy(linger=0)


class Pair:
    """Two channels that talk to each other; `got` is what the second has received."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path) -> None:
        left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        left.sndhwm = right.sndhwm = left.rcvhwm = right.rcvhwm = 0
        right.bind(f"ipc://{path / 'pair'}")
        left.connect(f"ipc://{path / 'pair'}")  # the connecting side can queue at once
        self.got: list[bytes] = []
        self.echoes: list[bytes] = []
        self.news = asyncio.Event()
        self.left = Channel(left, self._echo)
        self.right = Channel(right, self._take)

    def _take(self, frames: list[bytes]) -> None:
        self.got.append(frames[0])
        self.right.send([b"re:" + frames[0]])
        self.news.set()

    def _echo(self, frames: list[bytes]) -> None:
        self.echoes.append(frames[0])
        self.news.set()

    async def until(self, count: int) -> None:
        while len(self.echoes) < count:
            self.news.clear()
            await asyncio.wait_for(self.news.wait(), 10)

    def close(self) -> None:
        self.left.close()
        self.right.close()


@pytest.mark.asyncio
@pytest.mark.parametrize("burst", [1, 2, 255, 256, 257, 3000])
async def test_bursts_arrive_whole_and_in_order(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, burst: int
) -> None:
    pair = Pair(context, tmp_path)
    for i in range(burst):
        assert pair.left.send([b"%d" % i])
    await pair.until(burst)
    assert pair.got == [b"%d" % i for i in range(burst)]
    assert pair.echoes == [b"re:%d" % i for i in range(burst)]
    pair.close()


@pytest.mark.asyncio
async def test_strict_ping_pong_never_stalls(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    pair = Pair(context, tmp_path)
    for i in range(500):
        assert pair.left.send([b"%d" % i])
        await pair.until(i + 1)
    pair.close()


@pytest.mark.asyncio
async def test_what_waits_when_the_channel_is_made_is_delivered(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    left.bind(f"ipc://{tmp_path / 'pair'}")
    right.connect(f"ipc://{tmp_path / 'pair'}")
    left.send(b"early")
    assert right.poll(5_000, zmq.POLLIN)
    got: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
    channel = Channel(right, got.set_result)
    assert await asyncio.wait_for(got, 5) == [b"early"]
    channel.close()


@pytest.mark.asyncio
async def test_a_full_queue_refuses_and_says_when_it_is_open_again(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    sender.sndhwm, receiver.rcvhwm = 4, 4
    receiver.bind(f"ipc://{tmp_path / 'pair'}")
    sender.connect(f"ipc://{tmp_path / 'pair'}")
    writable = asyncio.Event()
    channel = Channel(sender, lambda frames: None, writable.set)
    sent = 0
    while channel.send([bytes(1 << 20)]):
        sent += 1
        assert sent < 1_000
    assert sent >= 4
    for _ in range(sent):
        await asyncio.to_thread(receiver.recv)
    await asyncio.wait_for(writable.wait(), 10)
    assert channel.send([b"again"])
    channel.close()


@pytest.mark.asyncio
async def test_closing_twice_is_fine_and_sends_nothing(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> None:
    pair = Pair(context, tmp_path)
    pair.close()
    pair.close()
    assert not pair.left.send([b"late"])
