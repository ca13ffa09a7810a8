"""Ranks and servers that die while something else goes on: a start, a drain, other weights, a spare that loads."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from treadle import Client, SamplingParams
from treadle.commands import run
from treadle.errors import EngineStartFailed, ServiceClosed
from treadle.scheduler import supervisor
from treadle.scheduler.lifecycle import GroupLost
from treadle.scheduler.service import Service

from .conftest import alive, eventually
from .faultkit import FACTS, PROMPTS, Faulty, faulty, params, undisturbed


async def until_it_is(service: Service, spare: str) -> None:
    async with asyncio.timeout(30):
        while service.health().spare != spare:
            await asyncio.sleep(0.01)


async def others(service: Service, *, but: set[int]) -> set[int]:
    """Waits for processes of groups that do not serve, other than those."""
    async with asyncio.timeout(30):
        while not (found := set(service.spare_pids) - but):
            await asyncio.sleep(0)
    return found


async def only_steps_hold_it_up(f: Faulty) -> int:
    """The other weights are loaded, and what is in flight has not landed. Returns the process that holds them."""
    async with asyncio.timeout(30):
        while not f.service._standing.paused:
            await asyncio.sleep(0.005)
    (other,) = f.service.spare_pids
    return other


@pytest.mark.asyncio
async def test_a_spare_that_dies_while_it_loads_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As often as one that was ready, and then once more for each group that serves."""
    monkeypatch.setattr(supervisor, "_SPARE_DELAY", 0.0)
    lines = ("0 0 kill 2", "0 0 kill 3", "0 10 exit 1")
    async with faulty(tmp_path, *lines, pace=0.005, tensor_parallel_size=1, standby=True, max_restarts=1) as f:
        await until_it_is(f.service, "lost")
        assert "no spare engine group is loaded any more" in caplog.text
        assert "the spare engine group did not start: engine rank 0 ended with signal SIGKILL; it was" in caplog.text
        f.submit_all()
        await f.all_ended()
        assert f.exact() and f.service.stats().recoveries == 1
        await until_it_is(f.service, "ready")


@pytest.mark.asyncio
async def test_other_weights_that_die_before_they_serve_change_nothing(tmp_path: Path) -> None:
    """They are loaded, and wait for the steps in flight: the old ranks go on as if nothing had been."""
    async with faulty(tmp_path, "0 3 stop 1", tensor_parallel_size=1, step_timeout=60.0) as f:
        before = f.service.engine_pids
        f.submit("0", PROMPTS[0], params(0))
        changing = asyncio.create_task(f.service.change_weights(FACTS))
        os.kill(await only_steps_hold_it_up(f), signal.SIGKILL)
        async with asyncio.timeout(30):
            while not f.events:
                await asyncio.sleep(0.01)
        os.kill(before[0], signal.SIGCONT)
        with pytest.raises(EngineStartFailed, match="SIGKILL"):
            await changing
        await f.sink.ended("0")
        assert f.sink.tokens["0"] == undisturbed(PROMPTS[0], params(0))
        assert f.service.engine_pids == before
        assert [event.serving for event in f.events if isinstance(event, GroupLost)] == [False]


@pytest.mark.asyncio
async def test_both_groups_of_a_change_die(tmp_path: Path) -> None:
    """The one that serves while the other loads, and then the other."""
    async with faulty(tmp_path, "0 3 exit 1", "0 0 hang 2", pace=0.02, tensor_parallel_size=1) as f:
        changing = asyncio.create_task(f.service.change_weights(FACTS))
        (other,) = await others(f.service, but=set())
        f.submit("0", PROMPTS[0], params(0))
        await f.sink.begun("0", 10)  # of the third group
        os.kill(other, signal.SIGKILL)
        with pytest.raises(EngineStartFailed, match="SIGKILL"):
            await changing
        await f.sink.ended("0")
        assert f.sink.tokens["0"] == undisturbed(PROMPTS[0], params(0))
        assert f.service.stats().recoveries == 1 and not alive([other])


@pytest.mark.asyncio
async def test_a_recovery_tells_nothing_of_other_weights(tmp_path: Path) -> None:
    """They are at their files; whoever is to serve is at its program."""
    faults = ("0 3 exit 1", "0 -1 stop 2", "0 0 hang 3")
    async with faulty(tmp_path, *faults, tensor_parallel_size=1, stop_timeout=0.1) as f:
        first = set(f.service.engine_pids)
        f.submit("0", PROMPTS[0], params(0))
        (coming,) = await others(f.service, but=first)
        changing = asyncio.create_task(f.service.change_weights(FACTS))
        supervisor = f.service._standing.supervisor
        async with asyncio.timeout(30):
            while supervisor is None or not any(group.heard for group in supervisor._beside):
                await asyncio.sleep(0.01)
        assert f.service.health().progress == "loading"
        os.kill(coming, signal.SIGKILL)
        newest = "a restart failed: engine rank 0 ended with signal SIGKILL"
        async with asyncio.timeout(30):
            while not (detail := f.service.health().detail).startswith(newest):
                await asyncio.sleep(0.01)
        assert "; before that: engine rank 0 ended with exit code 7" in detail
        await f.sink.ended("0")
        health = f.service.health()
        assert (health.progress, health.detail) == ("", "")
        changing.cancel()


@pytest.mark.asyncio
@pytest.mark.parametrize("loaded", [False, True])
async def test_a_service_that_is_closed_while_its_weights_change_says_so(tmp_path: Path, loaded: bool) -> None:
    faults = "0 3 hang 1" if loaded else "0 0 hang 2"
    async with faulty(tmp_path, faults, tensor_parallel_size=1, step_timeout=60.0, stop_timeout=0.1) as f:
        f.submit("0", PROMPTS[0], params(0))
        changing = asyncio.create_task(f.service.change_weights(FACTS))
        if loaded:
            await only_steps_hold_it_up(f)
        else:
            await others(f.service, but=set())
        await f.service.close()
        with pytest.raises(ServiceClosed):
            await asyncio.wait_for(changing, 10)


@pytest.mark.asyncio
async def test_health_and_error_name_the_rank_and_what_it_was_at(tmp_path: Path) -> None:
    f = Faulty(tmp_path, ["0 0 hang 1", "1 -1 stop 1"], 0.0, {})
    starting = asyncio.create_task(f.service.start())
    async with asyncio.timeout(30):
        while "rank 0: reading weights (0%)" not in (health := f.service.health()).progress:
            await asyncio.sleep(0.01)
    assert (health.state, health.progress.partition(", ")[2]) == ("starting", "rank 1: starting its program")
    os.kill(f.service.spare_pids[1], signal.SIGKILL)
    with pytest.raises(EngineStartFailed, match="rank 1 ended with signal SIGKILL; it was starting its program"):
        await starting
    assert not f.service.spare_pids


class RogueServer:
    """A server process whose ranks misbehave to order; `ready` waits until it says so."""

    def __init__(self, model: Path, runtime: Path, *faults: str, **options: object) -> None:
        self._runtime = runtime
        self.endpoint = f"ipc://{runtime}/s.ipc"
        (runtime / "faults").write_text("\n".join(faults))
        self._kept = set(runtime.iterdir())
        command = [sys.executable, "-m", "tests.rogue_server", str(model), self.endpoint, str(runtime / "faults")]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime)}
        self.process = subprocess.Popen([*command, json.dumps(options)], stdout=subprocess.PIPE, env=environment)

    def ready(self) -> None:
        assert self.process.stdout is not None and b"ready" in self.process.stdout.readline()

    def ranks(self, number: int) -> list[int]:
        """Waits until there are so many."""
        process = psutil.Process(self.process.pid)
        eventually(lambda: len(process.children()) == number, "the ranks are processes")
        return [child.pid for child in process.children()]

    def left(self) -> list[str]:
        return [str(path) for path in set(self._runtime.iterdir()) - self._kept if not path.name.startswith("faults.")]


@contextmanager
def rogue_server(model: Path, runtime: Path, *faults: str, **options: object) -> Iterator[RogueServer]:
    server = RogueServer(model, runtime, *faults, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def test_a_server_that_loads_says_so_and_can_be_drained(
    tiny: Path, runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rogue_server(tiny, runtime, "0 0 hang") as server:
        ranks = server.ranks(1)
        eventually(lambda: run(["health", "--endpoint", server.endpoint]) == 6, "it is starting")
        assert '"starting"' in capsys.readouterr().out
        assert run(["drain", "--endpoint", server.endpoint]) == 0
        assert server.process.wait(20) == 0
        assert not alive(ranks) and not server.left()


def test_a_server_killed_while_a_spare_and_other_weights_load_leaves_nothing(tiny: Path, runtime: Path) -> None:
    with rogue_server(tiny, runtime, "0 0 hang 2", "0 -1 hang 3", standby=True) as server:
        server.ready()

        async def change() -> None:
            async with Client(server.endpoint) as client:
                changing = asyncio.create_task(client.reload(str(tiny)))
                ranks = await asyncio.to_thread(server.ranks, 3)
                server.process.kill()
                await asyncio.to_thread(eventually, lambda: not alive(ranks), "the ranks end")
                changing.cancel()

        asyncio.run(change())
        server.process.wait()
        eventually(lambda: not server.left(), "no file is left")


@pytest.mark.asyncio
async def test_a_server_that_stands_still_in_a_drain_has_not_ended(
    tiny: Path, runtime: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with rogue_server(tiny, runtime, pace=0.3) as server:
        await asyncio.to_thread(server.ready)
        ranks = server.ranks(1)
        async with Client(server.endpoint) as client:
            stream = client.generate("a", SamplingParams(max_tokens=200, ignore_eos=True))
            await anext(stream)
            command = ["drain", "--endpoint", server.endpoint, "--connect-timeout", "1"]
            draining = asyncio.create_task(asyncio.to_thread(run, command))
            async with asyncio.timeout(20):
                while (await client.health()).state != "draining":
                    await asyncio.sleep(0.01)
            server.process.send_signal(signal.SIGSTOP)
            assert await draining == 2 and "no answer within 1 s" in capsys.readouterr().err
            server.process.kill()
            await asyncio.to_thread(eventually, lambda: not alive(ranks) and not server.left(), "nothing is left")
