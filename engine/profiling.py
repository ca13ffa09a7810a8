"""How busy the GPU is while it decodes: a look at the kernels of some steps, asked for by an environment variable.

TREADLE_PROFILE=DIRECTORY makes rank 0 record `STEPS` steps whenever the same number of rows has decoded, and nothing
else has happened, for `STEADY` steps; once for each number of rows. The outcome is DIRECTORY/decode-ROWS.json.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from treadle.transport.codec import unpack
from treadle.transport.messages import StepPlan

VARIABLE = "TREADLE_PROFILE"
STEADY = 16
STEPS = 32
_TOP = 16


@dataclass(frozen=True, slots=True)
class Activity:
    """A kernel or a copy on the GPU; microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `steps` steps, in microseconds of GPU time.

    busy_share: of the time from the first activity to the last, how much had any. between_steps_share: the share of the
    `steps` - 1 longest pauses, which are those between the steps when the GPU waits for its host there. kernels: share
    of the busy time and number per step of the most costly ones.
    """

    rows: int
    steps: int
    step_us: float
    busy_share: float
    between_steps_share: float
    longest_pauses_us: list[float]
    kernels: dict[str, tuple[float, float]]


def summarize(activities: Sequence[Activity], rows: int, steps: int) -> Summary:
    """activities: all that ran in these steps, in any order; at least one."""
    ordered = sorted(activities, key=lambda activity: activity.start)
    first, end, busy = ordered[0].start, ordered[0].start, 0.0
    pauses: list[float] = []
    costs: defaultdict[str, float] = defaultdict(float)
    numbers: Counter[str] = Counter()
    for activity in ordered:
        if activity.start > end:
            pauses.append(activity.start - end)
        busy += max(0.0, activity.end - max(end, activity.start))
        end = max(end, activity.end)
        costs[activity.name] += activity.end - activity.start
        numbers[activity.name] += 1
    span = max(end - first, 1e-9)
    longest = sorted(pauses, reverse=True)[: max(steps - 1, 0)]
    total = max(sum(costs.values()), 1e-9)
    return Summary(
        rows=rows,
        steps=steps,
        step_us=round(span / steps, 1),
        busy_share=round(busy / span, 4),
        between_steps_share=round(sum(longest) / span, 4),
        longest_pauses_us=[round(pause, 1) for pause in longest[:_TOP]],
        kernels={
            name: (round(costs[name] / total, 4), round(numbers[name] / steps, 2))
            for name in sorted(costs, key=lambda name: costs[name], reverse=True)[:_TOP]
        },
    )


class StepProfiler:
    """Told of every plan before it runs; costs nothing else until there is something to record."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rows = 0
        self._streak = 0
        self._done: set[int] = set()
        self._profile: torch.profiler.profile | None = None

    def before(self, plan: StepPlan) -> None:
        rows = self._decoding(plan)
        self._streak = self._streak + 1 if rows and rows == self._rows else 0
        if self._profile is not None and (self._streak == 0 or self._streak >= STEADY + STEPS):
            self._finish(complete=self._streak > 0)
        self._rows = rows
        if self._streak == STEADY and rows not in self._done:
            torch.cuda.synchronize()
            self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profile.start()

    @staticmethod
    def _decoding(plan: StepPlan) -> int:
        """The number of rows of a plan that only decodes, else 0."""
        counts = unpack(plan.counts)
        pure = not plan.start and not plan.release and len(counts) > 0 and int(counts.max()) == 1
        return len(counts) if pure else 0

    def _finish(self, complete: bool) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        torch.cuda.synchronize()
        profile.stop()
        activities = [
            Activity(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
        ]
        if complete and activities:
            self._done.add(self._rows)
            summary = summarize(activities, self._rows, STEPS)
            (self._directory / f"decode-{self._rows}.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")


def step_profiler(rank: int) -> StepProfiler | None:
    """What the environment asks for; None on machines without a GPU and on every rank but the first."""
    directory = os.environ.get(VARIABLE)
    if not directory or rank != 0 or not torch.cuda.is_available():
        return None
    Path(directory).mkdir(parents=True, exist_ok=True)
    return StepProfiler(Path(directory))
