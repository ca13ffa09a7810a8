"""How the benchmark of overload judges, and whom it blames. No time is measured."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.scriptkit import script

SCRIPTS = str(Path(__file__).parent.parent / "scripts")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        return script("bench_overload")


def phase(bench: ModuleType, refusals: list[float]) -> object:
    return bench.Phase(latency=[1.0], refusal=refusals, memory=[1_000_000], seconds=1.0)


def test_every_refusal_has_to_be_quick(bench: ModuleType) -> None:
    """One in a thousand that is not is under no percentile, but somebody waits for it."""
    once, quick = phase(bench, []), [0.002] * 999
    assert bench.judged(once, phase(bench, [*quick, 0.0499]))["good"]
    assert not bench.judged(once, phase(bench, [*quick, 0.051]))["good"]


def test_what_the_host_took_is_told_apart_and_not_forgiven(bench: ModuleType) -> None:
    many = bench.Phase(latency=[1.0], refusal=[0.002, 0.08, 0.09], memory=[1], seconds=1.0)
    many.slow = [{"ms": 80.0, "stolen_ms": 40.0}, {"ms": 90.0, "stolen_ms": 20.0}]
    judged = bench.judged(phase(bench, []), many)
    assert judged["refusals_over_50_ms"] == 2 and judged["refusals_over_50_ms_of_our_own"] == 1
    assert not judged["good"]


def test_the_time_of_a_refusal_by_whoever_had_it(bench: ModuleType) -> None:
    holdups = sys.modules["holdups"]
    before = holdups.Moment(1.0, (5.0, 7.0), {"load": holdups.Thread(2.0, 1.0)})
    after = holdups.Moment(1.1, (5.01, 7.03), {"load": holdups.Thread(2.02, 1.04)})
    assert holdups.held_up(before, after) == {
        "ms": 100.0,
        "stolen_ms": 30.0,
        "load_ran_ms": 20.0,
        "load_waited_ms": 40.0,
    }


def test_the_clocks_of_this_machine_can_be_read(bench: ModuleType) -> None:
    moment = sys.modules["holdups"].look({"me": os.getpid()})
    assert (
        len(moment.stolen)
        == len([line for line in Path("/proc/stat").read_text().splitlines() if line[:3] == "cpu"]) - 1
    )
    assert moment.threads["me"].ran > 0
