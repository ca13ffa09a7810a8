"""How busy a GPU was, from what ran on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from treadle.engine.profiling import VARIABLE, Activity, StepProfiler, step_profiler, summarize
from treadle.transport.codec import pack
from treadle.transport.messages import StepPlan


def plan(counts: list[int], release: list[int] | None = None) -> StepPlan:
    rows, nothing = pack(np.arange(len(counts))), pack(np.empty(0, np.int64))
    return StepPlan(1, pack(np.array(release or [])), [], nothing, nothing, rows, pack(np.array(counts)))


def test_overlapping_activities_count_once_and_pauses_are_found() -> None:
    activities = [
        Activity("b", 30, 40),
        Activity("a", 0, 10),
        Activity("copy", 5, 12),
        Activity("a", 12, 20),
    ]
    summary = summarize(activities, rows=4, steps=2)
    assert summary.step_us == 20
    assert summary.busy_share == 0.75
    assert summary.between_steps_share == 0.25
    assert summary.longest_pauses_us == [10]
    assert summary.kernels["a"] == (round(18 / 35, 4), 1.0)


def test_only_steady_decoding_counts() -> None:
    assert StepProfiler._decoding(plan([1, 1, 1])) == 3
    assert StepProfiler._decoding(plan([1, 7])) == 0
    assert StepProfiler._decoding(plan([1], release=[4])) == 0
    assert StepProfiler._decoding(plan([])) == 0


def test_nothing_is_profiled_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert step_profiler(0) is None
    monkeypatch.setenv(VARIABLE, str(tmp_path / "there"))
    assert step_profiler(1) is None
