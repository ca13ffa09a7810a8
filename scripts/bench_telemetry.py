#!/usr/bin/env python
"""What being watched costs the scheduler's thread: metrics, traces and a recorded timeline.

    bench_telemetry.py [--json] [--rows 1,64,256,1024] [--steps 2000]

step: a steady step of greedy rows as `bench_scheduler.py` has it (plan, encode, decode the result, apply), bare, with
metrics, and with metrics while a timeline is recorded, in turns on the same core, so that a machine whose speed drifts
treats all alike; medians. `metrics` and `recording` are what the calls take alone, in CPU time: a mean of many, folding
into histograms included. `of_step` is their share of the scheduler's own step, and `of_1ms` of a step that
takes the engine a millisecond, which only a small model does.
request: what a request of one prompt chunk and its end cost, without a trace and with one. All in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import deque
from time import perf_counter, perf_counter_ns, thread_time_ns
from typing import Any

from scheduler_cases import ENDLESS, Decode, answer, make_core, next_plan

from treadle.scheduler.delivery import Route, Sink
from treadle.scheduler.request_trace import begin_trace
from treadle.scheduler.step import Step, sent
from treadle.scheduler.telemetry import Telemetry
from treadle.scheduler.timeline import MOST_ENTRIES, Recorder
from treadle.transport.codec import pack, rank_codec
from treadle.transport.messages import StepPlan, StepResult, Submit

CONTEXT = 256
WARM_UP = 60
MODES = ("bare", "metrics", "recording")


class Watch:
    """What the service does around a step, or the part of it that a mode has."""

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self.recorder = Recorder(perf_counter(), {})

    def planned(self, step: Step, plan: StepPlan, mode: str) -> None:
        if mode == "bare":
            return
        step.plan_at, step.ready_at = perf_counter(), perf_counter()
        step.out_at = perf_counter()
        step.chunks = self.telemetry.lives.planned(plan, (), step.out_at)
        if mode == "recording":
            self.recorder.sent(step, plan, ())

    def landed(self, step: Step, mode: str) -> None:
        if mode == "bare":
            return
        step.back_at, step.applied_at, step.deliver_at = perf_counter(), perf_counter(), perf_counter()
        self.telemetry.lives.landed(step)
        step.delivered_at = perf_counter()
        self.telemetry.note(step)
        if mode == "recording":
            self.recorder.landed(step)


class Watched:
    """The steps of a `Decode`, watched. last: the newest plan."""

    def __init__(self, rows: int, steps: int) -> None:
        self._case = Decode(rows, CONTEXT, steps + 2)
        self._watch = Watch()
        self._codec = rank_codec()
        self._rows = rows
        self.last = next_plan(self._case.core)
        self._flights = deque([sent(self.last, b"", 0.0)])
        self._case.core.apply(answer(StepPlan(0, b"", [], b"", b"", b"", b""), rows), 0.0)  # the one of `Decode`

    def step(self, mode: str) -> int:
        """Nanoseconds of the whole."""
        began = perf_counter_ns()
        self.last = plan = next_plan(self._case.core)
        step = sent(plan, self._codec.encode(plan), 0.0)
        self._watch.planned(step, plan, mode)
        self._flights.append(step)
        done = self._flights.popleft()
        done.results[0] = result = answer(plan, self._rows)
        self._case.core.apply(StepResult(done.number, 0, 0, result.tokens, 900, [], [], 0, 800, 100), 0.0)
        self._watch.landed(done, mode)
        return perf_counter_ns() - began


class _Nowhere(Sink):
    def flush(self) -> None:
        """Nobody reads."""


def alone(plan: StepPlan, mode: str, count: int) -> float:
    """The calls of a mode, in CPU time of this thread, which others on the machine do not lengthen."""
    watch = Watch()
    result = StepResult(plan.step, 0, 0, b"", 900, [], [], 0, 800, 100)
    made = [sent(plan, b"", 0.0) for _ in range(count)]
    began = thread_time_ns()
    for step in made:
        watch.planned(step, plan, mode)
        step.results[0] = result
        watch.landed(step, mode)
    return (thread_time_ns() - began) / count / 1e3


def steps(rows: int, count: int) -> dict[str, float]:
    watched = Watched(rows, count + WARM_UP)
    for place in range(WARM_UP):
        watched.step(MODES[place % 3])
    times: dict[str, list[int]] = {mode: [] for mode in MODES}
    for place in range(count):
        times[MODES[place % 3]].append(watched.step(MODES[place % 3]))
    report = {f"step_{mode}": statistics.median(part) / 1e3 for mode, part in times.items()}
    many = min(25_600, 10 * count)
    enough = max(256, MOST_ENTRIES // (2 * rows))
    metrics = alone(watched.last, "metrics", many)
    report |= {"metrics": metrics, "recording": alone(watched.last, "recording", min(enough, many)) - metrics}
    return report | {"of_step": metrics / report["step_bare"], "of_1ms": metrics / 1e3}


def request(traced: bool, count: int) -> float:
    """The calls alone: it arrives, runs a chunk, gets a token and ends."""
    core, telemetry, sink, codec = make_core(4, 256, 256), Telemetry(), _Nowhere("client-1"), rank_codec()
    times: list[int] = []
    for number in range(count):
        submit = Submit(id=str(number), tokens=pack([1 + number % 999] * 64), params=ENDLESS)
        made = core.add(submit, 0.0)
        began = perf_counter_ns()
        now = perf_counter()
        made.context = Route(sink, submit.id, -1, now, begin_trace(submit, now, 1) if traced else None)
        telemetry.lives.entered(made)
        spent = perf_counter_ns() - began
        plan = next_plan(core)
        step = sent(plan, codec.encode(plan), 0.0)
        step.results[0] = answer(plan, 1)
        began = perf_counter_ns()
        step.chunks = telemetry.lives.planned(plan, core.started(plan), perf_counter())
        step.back_at = perf_counter()
        spent += perf_counter_ns() - began
        core.apply(step.results[0], 0.0)
        began = perf_counter_ns()
        telemetry.lives.landed(step)
        spent += perf_counter_ns() - began
        outputs = core.abort(submit.id, 0.0)
        began = perf_counter_ns()
        ended = telemetry.lives.ended(outputs[0], perf_counter())
        times.append(spent + perf_counter_ns() - began)
        if (ended is not None) != traced:
            raise RuntimeError("it was not traced as asked")
    return statistics.median(times) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rows", default="1,64,256,1024", help="row counts, separated by commas")
    parser.add_argument("--steps", type=int, default=2000, help="measured steps for each row count")
    asked = parser.parse_args()
    report: dict[str, Any] = {"unit": "us"}
    report["step"] = {rows: steps(int(rows), asked.steps) for rows in asked.rows.split(",")}
    report["request"] = {"untraced": request(False, 500), "traced": request(True, 500)}
    if asked.json:
        print(json.dumps(report))
        return 0
    for rows, found in report["step"].items():
        print(f"{rows} rows: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    print("request: " + ", ".join(f"{name} {value:.3g}" for name, value in report["request"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
