"""Every way in which a rank can fail is found, named, and survived. Real processes, no model: `rogue_engine`."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import EngineFailed, EngineStartFailed, ServiceClosed
from treadle.scheduler import supervisor
from treadle.scheduler.deadline import StepDeadline
from treadle.scheduler.lifecycle import GaveUp, GroupLost, GroupReady, backoff

from .conftest import alive, eventually
from .faultkit import PROMPTS, Faulty, faulty, params, undisturbed

DEEDS = [
    ("raise", "raised", "RuntimeError: something broke"),
    ("memory", "raised", "20 MiB were not to be had"),
    ("exit", "exit", "exit code 7"),
    ("abort", "exit", "signal SIGABRT"),
    ("stop", "hang", "did not finish step"),
    ("hang", "hang", "did not finish step"),
    ("close", "unreachable", "cannot be reached"),
    ("garbage", "malformed", "malformed message"),
    ("unasked", "malformed", "unasked"),
    ("twice", "malformed", "unasked"),
    ("impostor", "malformed", "answered as rank"),
    ("digest", "disagreed", "disagrees at step"),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("deed", "cause", "said"), DEEDS)
async def test_a_failing_rank_is_named_and_no_token_is_lost(tmp_path: Path, deed: str, cause: str, said: str) -> None:
    async with faulty(tmp_path, f"1 10 {deed}") as f:
        before = f.service.engine_pids
        f.submit_all()
        await f.all_ended()
        lost, ready = f.events
        assert isinstance(lost, GroupLost) and isinstance(ready, GroupReady)
        assert (lost.group, lost.cause, lost.serving) == (1, cause, True)
        assert lost.rank == (-1 if deed == "garbage" else 1)
        assert said in lost.detail
        assert lost.step >= 8 and "computing" in lost.doing and "rows" in lost.doing
        assert (ready.group, ready.spare) == (2, False)
        assert f.exact()
        assert sorted(f.sink.ends) == ["0", "1", "2", "3"]
        assert f.service.stats().blocks_used == 0
        assert not alive(before)
        assert f.service.health().state == "ready"


@pytest.mark.asyncio
async def test_a_result_that_does_not_fit_its_plan_is_the_ranks_fault(tmp_path: Path) -> None:
    """Rank 0 brings the tokens; its own digest covers those that it should have brought."""
    async with faulty(tmp_path, "0 10 tokens") as f:
        f.submit_all()
        await f.all_ended()
        lost = f.events[0]
        assert isinstance(lost, GroupLost) and lost.cause == "disagreed"
        assert f.exact()


@pytest.mark.asyncio
async def test_a_row_at_fault_ends_alone_and_no_group_is_lost(tmp_path: Path) -> None:
    async with faulty(tmp_path, "0 10 row") as f:
        f.submit_all()
        await f.all_ended()
        failed = [key for key, delta in f.sink.last.items() if delta.finish == "error"]
        assert len(failed) == 1
        assert f.sink.last[failed[0]].error_code == "request_failed"
        assert "its bias is not a number" in f.sink.last[failed[0]].error
        assert f.exact(but=failed)
        assert not f.events


@pytest.mark.asyncio
@pytest.mark.parametrize("deaths", [2, 3])
async def test_only_who_kills_an_engine_alone_fails_and_alone(tmp_path: Path, deaths: int) -> None:
    """The first group dies under four requests, the next at its first step, which has the first suspect, and the third
    at its own, which has that one and nobody else."""
    lines = ["1 10 exit 1", "1 1 exit 2", "1 1 exit 3"]
    async with faulty(tmp_path, *lines[:deaths], pace=0.005) as f:
        f.submit_all()
        await f.all_ended()
        failed = [key for key, delta in f.sink.last.items() if delta.finish == "error"]
        assert failed == (["0"] if deaths == 3 else [])
        if failed:
            assert "died 3 times in a row while this request was running" in f.sink.last["0"].error
        assert f.exact(but=failed)
        assert f.service.stats().recoveries == deaths


@pytest.mark.asyncio
async def test_a_group_that_fails_to_load_is_tried_again(tmp_path: Path) -> None:
    async with faulty(tmp_path, "1 10 exit", pace=0.005) as f:
        f.submit_all()
        await f.sink.begun("0", 2)
        with (tmp_path / "faults").open("a") as script:
            script.write("\n0 0 bad-weights")
        await f.all_ended()
        assert f.exact()
        ready = f.events[-1]
        assert isinstance(ready, GroupReady) and (ready.group, ready.attempts) == (3, 2)


@pytest.mark.asyncio
async def test_a_rank_that_cannot_be_watched_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no descriptor is left: the first rank has one, the second has none."""
    watched: list[int] = []
    started: list[int] = []
    real = os.pidfd_open

    def few(pid: int) -> int:
        started.append(pid)
        if watched:
            raise OSError(errno.EMFILE, "Too many open files")
        watched.append(pid)
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", few)
    with pytest.raises(EngineStartFailed, match="Too many open files"):
        async with faulty(tmp_path):
            pass
    assert len(started) == 2
    assert not {child.pid for child in psutil.Process().children()} & set(started)


@pytest.mark.asyncio
async def test_past_the_limit_everybody_is_refused_with_a_typed_error(tmp_path: Path) -> None:
    lines = ["1 10 exit"] + ["0 0 bad-weights"] * 3
    async with faulty(tmp_path, *lines[:1], pace=0.005, max_restarts=2) as f:
        f.submit_all()
        await f.sink.begun("0", 2)
        (tmp_path / "faults").write_text("\n".join(lines))
        await f.all_ended()
        assert {delta.error_code for delta in f.sink.last.values()} == {EngineFailed.code}
        assert isinstance(f.events[-1], GaveUp) and f.events[-1].attempts == 2
        assert f.service.failed.is_set() and f.service.health().state == "failed"
        with pytest.raises(ServiceClosed, match="ends too early"):
            f.submit("more", PROMPTS[0], params(0))


@pytest.mark.asyncio
async def test_a_stopped_rank_is_ended_before_the_next_group_serves(tmp_path: Path) -> None:
    async with faulty(tmp_path, "0 10 stop", step_timeout=1.0) as f:
        before = f.service.engine_pids
        f.submit_all()
        await f.all_ended()
        assert not alive(before)
    after = f.service.engine_pids + f.service.spare_pids
    assert not after


@pytest.mark.asyncio
async def test_a_lost_rank_is_found_while_nothing_runs(tmp_path: Path) -> None:
    async with faulty(tmp_path) as f:
        before = f.service.engine_pids
        os.kill(before[1], signal.SIGKILL)
        async with asyncio.timeout(20):
            while f.service.stats().recoveries < 1:
                await asyncio.sleep(0.01)
        lost = f.events[0]
        assert isinstance(lost, GroupLost) and (lost.rank, lost.step, lost.doing) == (1, -1, "between steps")
        f.submit_all()
        await f.all_ended()
        assert f.exact()


@pytest.mark.asyncio
async def test_a_lost_socket_is_found_while_nothing_runs(tmp_path: Path) -> None:
    """By the monitor: nobody would send anything, and the process lives."""
    async with faulty(tmp_path, "1 10 leave") as f:
        f.submit("only", PROMPTS[0], params(0, 10))
        await f.sink.ended("only")
        async with asyncio.timeout(20):
            while f.service.stats().recoveries < 1:
                await asyncio.sleep(0.01)
        lost = f.events[0]
        assert isinstance(lost, GroupLost) and (lost.rank, lost.cause) == (1, "unreachable")
        f.submit_all()
        await f.all_ended()
        assert f.exact()


@pytest.mark.asyncio
async def test_a_spare_group_takes_over(tmp_path: Path) -> None:
    async with faulty(tmp_path, "1 10 exit", pace=0.005, standby=True) as f:
        await spare_is(f.service, "ready")
        spare = f.service.spare_pids
        first = f.service.engine_pids
        f.submit_all()
        await f.all_ended()
        assert f.exact()
        assert f.service.engine_pids == spare
        ready = f.events[-1]
        assert isinstance(ready, GroupReady) and ready.spare
        await spare_is(f.service, "ready")
        eventually(lambda: not alive(first), "the lost group is gone")
        assert len(f.service.spare_pids) == 2


@pytest.mark.asyncio
async def test_a_lost_spare_disturbs_nobody_and_is_replaced(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.005, standby=True) as f:
        await spare_is(f.service, "ready")
        spare = f.service.spare_pids
        f.submit_all()
        await f.sink.begun("0")
        os.kill(spare[0], signal.SIGKILL)
        await f.all_ended()
        assert f.exact()
        await spare_is(f.service, "loading")
        await spare_is(f.service, "ready")
        assert not set(f.service.spare_pids) & set(spare)
        (lost,) = f.events
        assert isinstance(lost, GroupLost) and not lost.serving
        assert f.service.stats().recoveries == 0
    eventually(lambda: not alive(spare), "the spare group is gone")


@pytest.mark.asyncio
async def test_a_spare_that_waits_to_be_loaded_is_loaded_at_once_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_SPARE_DELAY", 3600.0)
    async with faulty(tmp_path, "1 5 exit", "1 9 exit", pace=0.005, standby=True) as f:
        await spare_is(f.service, "ready")
        f.submit_all()
        await f.all_ended()
        assert f.exact() and f.service.stats().recoveries == 2


async def spare_is(service: object, state: str) -> None:
    from treadle.scheduler.service import Service

    assert isinstance(service, Service)
    async with asyncio.timeout(30):
        while service.health().spare != state:
            await asyncio.sleep(0.01)


def test_undisturbed_runs_differ_by_request() -> None:
    assert undisturbed(PROMPTS[0], params(0)) != undisturbed(PROMPTS[0], params(1))


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-4, 30)), max_size=60), st.integers(1, 5000))
def test_a_deadline_lies_between_its_bounds_and_above_what_was_seen(
    steps: list[tuple[int, float]], tokens: int
) -> None:
    deadline = StepDeadline(2.0, 60.0)
    for size, seconds in steps:
        deadline.observe(size, seconds)
    allowed = deadline.seconds(tokens)
    assert 2.0 <= allowed <= 60.0
    if steps and steps[-1][0] == tokens:
        assert allowed >= min(steps[-1][1], 60.0)


def test_a_deadline_is_learned_per_size_and_again_for_another_group() -> None:
    deadline = StepDeadline(1.0, 100.0)
    assert deadline.seconds(1) == 100.0
    for _ in range(8):
        deadline.observe(4, 0.01)
    assert deadline.seconds(4) == 1.0
    assert deadline.seconds(2) == 1.0, "a smaller step takes no longer"
    assert deadline.seconds(100) == 100.0, "a greater one has not been seen"
    for _ in range(8):
        deadline.observe(100, 0.5)
    assert deadline.seconds(100) == 10.0 and deadline.seconds(4) == 1.0
    deadline.restart()
    assert deadline.seconds(4) == 100.0


def test_backoff_grows_and_stays() -> None:
    delays = [backoff(attempt) for attempt in range(10)]
    assert delays[0] == 0.0 and delays == sorted(delays) and delays[-1] == delays[-2]


@pytest.mark.asyncio
async def test_a_service_that_is_closed_while_its_ranks_load_says_so(tmp_path: Path) -> None:
    """Whoever waits for its start was not cancelled, and is not told so."""
    f = Faulty(tmp_path, [], 0.0, {})
    starting = asyncio.create_task(f.service.start())
    await asyncio.sleep(0)  # the ranks are processes now, and not more
    ranks = [psutil.Process(pid) for pid in f.service.spare_pids]
    assert len(ranks) == 2
    await f.service.close()
    with pytest.raises(ServiceClosed, match="while it started"):
        await starting
    assert f.service.health().state == "closed" and not any(rank.is_running() for rank in ranks)
