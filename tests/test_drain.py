"""A server ends without dropping anything, and changes its weights without dropping anything."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from treadle import Client, SamplingParams
from treadle.errors import ConfigError, InvalidRequest, ModelNotFound, ServerLost, ServiceClosed, ServiceDraining
from treadle.scheduler.lifecycle import GroupLost

from .conftest import alive, eventually
from .faultkit import FACTS, PROMPTS, faulty, params, undisturbed
from .modelkit import make_checkpoint
from .servekit import Server, serving

GREEDY = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)


@pytest.mark.asyncio
async def test_draining_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.003) as f:
        f.submit_all()
        await f.sink.begun("0")
        draining = asyncio.create_task(f.service.drain(30.0))
        await asyncio.sleep(0)
        assert f.service.health().state == "draining"
        with pytest.raises(ServiceDraining):
            f.submit("new", PROMPTS[0], params(0))
        assert await draining
        assert len(f.sink.ends) == 4 and f.exact()
        assert await f.service.drain(0.0), "nothing is left to wait for"


@pytest.mark.asyncio
async def test_draining_survives_the_loss_of_the_engines_and_ends_with_its_grace(tmp_path: Path) -> None:
    async with faulty(tmp_path, "1 10 exit", pace=0.003) as f:
        f.submit_all()
        assert not await f.service.drain(0.0)
        assert f.service.unfinished == 4
        assert await f.service.drain(30.0)
        assert isinstance(f.events[0], GroupLost) and f.exact()


@pytest.mark.asyncio
async def test_other_weights_without_dropping_a_request(tmp_path: Path) -> None:
    """The ranks of this test sample by seed and tokens alone, so the change does not show in what comes out."""
    other = msgspec.structs.replace(FACTS, path="/other")
    async with faulty(tmp_path, pace=0.01, standby=True) as f:
        before = f.service.engine_pids
        f.submit_all()
        f.submit("long", [5], params(9, 450))
        await f.sink.begun("0", 3)
        changing = asyncio.create_task(f.service.change_weights(other))
        await asyncio.sleep(0)
        with pytest.raises(InvalidRequest, match="being loaded already"):
            await f.service.change_weights(other)
        await changing
        assert f.service.facts.path == "/other"
        assert not set(f.service.engine_pids) & set(before)
        assert f.service.unfinished
        await f.all_ended()
        await f.sink.ended("long")
        assert f.sink.tokens["long"] == undisturbed([5], params(9, 450))
        assert f.exact() and f.service.stats().recoveries == 0 and not f.events
        async with asyncio.timeout(30):
            while f.service.health().spare != "ready":
                await asyncio.sleep(0.01)
        assert not alive(before)
        os.kill(f.service.engine_pids[0], signal.SIGKILL)
        f.submit("after", PROMPTS[0], params(0))
        await f.sink.ended("after")
        with pytest.raises(ConfigError, match="vocab_size is 7"):
            await f.service.change_weights(msgspec.structs.replace(FACTS, vocab_size=7))


@pytest.mark.asyncio
async def test_weights_that_do_not_load_change_nothing(tmp_path: Path) -> None:
    async with faulty(tmp_path, "0 0 bad-weights 2", pace=0.005) as f:
        before = f.service.engine_pids
        f.submit_all()
        with pytest.raises(Exception, match="ends too early"):
            await f.service.change_weights(FACTS)
        await f.all_ended()
        assert f.exact() and f.service.engine_pids == before and not f.events


def command(name: str, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "treadle", name, *arguments, "--endpoint", server.endpoint]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


@pytest.mark.asyncio
async def test_the_commands_reload_and_drain(tiny: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", "llama3", seed=1)
    with serving(tmp_path / "server", tiny, "--dtype", "float32") as server:
        async with Client(server.endpoint) as client:
            first = (await client.generate("a", GREEDY).final()).token_ids
            with pytest.raises(ModelNotFound):
                await client.reload(str(tmp_path / "nothing"))
            running = client.generate("a", GREEDY)
            await anext(running)
            done = await asyncio.to_thread(command, "reload", server, str(other))
            assert done.returncode == 0 and str(other) in done.stdout, done.stderr
            assert len((await running.final()).token_ids) == 200
            second = (await client.generate("a", GREEDY).final()).token_ids
            assert len(second) == 200 and second != first
            streams = [client.generate("a", GREEDY) for _ in range(4)]
            await anext(streams[0])
            draining = asyncio.create_task(asyncio.to_thread(command, "drain", server))
            assert [(await stream.final()).token_ids for stream in streams] == [second] * 4
            with pytest.raises((ServiceDraining, ServerLost)):
                while True:  # until the command has reached the server
                    await client.generate("a", GREEDY).final()
            assert (await draining).returncode == 0
        assert await asyncio.to_thread(server.process.wait, 30) == 0
        eventually(lambda: not server.files, "no file is left")


@pytest.mark.asyncio
async def test_sigterm_drains_and_a_second_one_ends_at_once(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "server", tiny, "--drain-timeout", "1000", "--stop-timeout", "0.2") as server:
        async with Client(server.endpoint) as client:
            stream = client.generate("a", GREEDY)
            await anext(stream)
            os.kill(server.ranks[0], signal.SIGSTOP)  # so it would drain until the step's deadline
            server.process.terminate()
            async with asyncio.timeout(20):
                while (await client.health()).state != "draining":
                    await asyncio.sleep(0.01)
            assert server.process.poll() is None
            server.process.terminate()
            with pytest.raises(ServiceClosed, match="stopped"):
                await stream.final()
        assert await asyncio.to_thread(server.process.wait, 30) == 0
