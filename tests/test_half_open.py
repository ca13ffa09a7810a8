"""A tcp connection that is dead and does not say so: a cable pulled, a router that forgot, a machine without power."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from treadle import Client
from treadle.errors import ServerLost
from treadle.scheduler import client_server
from treadle.transport import sockets
from treadle.transport.endpoints import write_keys

from .faultkit import PROMPTS, Faulty, params, undisturbed
from .test_security import served

_CHUNK = 1 << 16
_FOREVER = 1e6


class Cable:
    """Carries tcp connections. `cut` loses all that those of now will send, and closes nothing."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._targets: dict[asyncio.StreamWriter, bool] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, back), (there, writer)):
            self._targets[target] = True
            self._tasks.add(asyncio.create_task(self._forward(source, target)))

    def cut(self) -> None:
        self._targets = dict.fromkeys(self._targets, False)

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(_CHUNK):
            if self._targets[target]:
                target.write(data)
        if self._targets[target]:
            target.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for target in self._targets:
            target.close()


@asynccontextmanager
async def cabled(directory: Path) -> AsyncIterator[tuple[Faulty, Cable, str, str]]:
    """A service over tcp with CURVE; the endpoint and the public key are those behind the cable."""
    keys = write_keys(directory / "keys")
    async with served(directory, tcp=keys, pace=0.01) as (f, endpoint):
        cable = Cable(int(endpoint.rpartition(":")[2]))
        async with await asyncio.start_server(cable.carry, "127.0.0.1", 0) as listener:
            yield f, cable, f"tcp://127.0.0.1:{listener.sockets[0].getsockname()[1]}", keys.public
            await cable.close()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that give up early, and nothing else that would: neither the server's sweep nor the client."""
    monkeypatch.setattr(sockets, "_HEARTBEAT_MS", 100)
    monkeypatch.setattr(sockets, "_HEARTBEAT_TIMEOUT_MS", 700)
    monkeypatch.setattr(client_server, "_SILENCE_SECONDS", _FOREVER)


@pytest.mark.asyncio
async def test_the_requests_of_a_client_behind_a_dead_connection_end(tmp_path: Path) -> None:
    async with (
        cabled(tmp_path) as (f, cable, endpoint, key),
        Client(endpoint, server_key=key, lost_after=_FOREVER) as client,
    ):
        stream = client.generate(PROMPTS[0], params(0, 450))
        await anext(stream)
        cable.cut()
        async with asyncio.timeout(20):
            while f.service.unfinished:
                await asyncio.sleep(0.01)
        stats = f.service.stats()
        assert stats.generated_tokens < 450 and stats.blocks_used == 0, "ended before its time"
        with pytest.raises(ServerLost, match="had lost this client"):  # the client has connected again, and learnt it
            await stream.final()
        again = await client.generate(PROMPTS[0], params(0)).final()
        assert again.token_ids == undisturbed(PROMPTS[0], params(0))


@pytest.mark.asyncio
async def test_a_stream_that_resumes_goes_on_over_another_connection(tmp_path: Path) -> None:
    async with (
        cabled(tmp_path) as (f, cable, endpoint, key),
        Client(endpoint, server_key=key, resume=True) as client,
    ):
        stream = client.generate(PROMPTS[0], params(0, 120))
        await anext(stream)
        cable.cut()
        assert (await stream.final()).token_ids == undisturbed(PROMPTS[0], params(0, 120))
        assert f.service.stats().blocks_used == 0
