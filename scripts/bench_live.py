#!/usr/bin/env python
"""What the live view costs the scheduler's thread, in microseconds.

    bench_live.py [--json FILE] [--rows 1,64,256,1024] [--blocks 20000,1000000] [--times 200]

look: one picture, for somebody who asks. follow: what a steady decode step pays so that latencies are known, beside the
step itself (plan and apply). start_and_end: what one continuation pays for it in all. Medians after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.deadline import StepDeadline
from treadle.scheduler.latencies import Latencies
from treadle.scheduler.live import LiveDesk, Sights
from treadle.scheduler.pipeline import Pipeline
from treadle.scheduler.request import Output
from treadle.transport.codec import pack
from treadle.transport.messages import Health, SamplingParams, StepPlan, StepResult, Submit

VOCAB = 50_000
PROMPT = 64
WARM_UP = 20
FOREVER = SamplingParams(temperature=0.0, max_tokens=None, seed=0)


def microseconds(work: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(WARM_UP + times):
        began = perf_counter_ns()
        work()
        found.append((perf_counter_ns() - began) / 1e3)
    return statistics.median(found[WARM_UP:])


def running(rows: int, blocks: int) -> tuple[Core, StepPlan]:
    """A core whose rows all decode, and the plan that began them. Depth 1, so that a plan waits for its result."""
    config = CoreConfig(
        num_blocks=blocks,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * PROMPT,
        vocab_size=VOCAB,
        pipeline_depth=1,
        reserve_output="none",
    )
    core = Core(config, lambda: 0)
    for i in range(rows):
        core.add(
            Submit(id=f"client-1/{i:032x}", tokens=pack((np.arange(PROMPT) * (i + 1)) % VOCAB), params=FOREVER), 0.0
        )
    plan = core.plan(0.0)
    assert plan is not None
    core.apply(StepResult(plan.step, 0, 0, pack(np.arange(rows)), 20_000), 0.0, 0.02)
    return core, plan


def measure(rows: int, blocks: int, times: int) -> dict[str, float]:
    core, first = running(rows, blocks)
    desk, tokens = LiveDesk(), pack(np.arange(rows) % VOCAB)
    pipeline = Pipeline(1, StepDeadline(1.0, 60.0), lambda: True, print, lambda death, step: None)
    sights = Sights("x", "model", rows, 1, core.stats(), Health(state="ready"), core, pipeline, [1])
    desk.planned(core, first, 0.0)
    desk.applied(core, 0.0)
    followed: list[float] = []

    def step() -> None:
        plan = core.plan(0.0)
        assert plan is not None
        core.apply(StepResult(plan.step, 0, 0, tokens, 20_000), 0.0, 0.02)
        began = perf_counter_ns()
        desk.planned(core, plan, 0.0)
        desk.applied(core, 0.0)
        followed.append((perf_counter_ns() - began) / 1e3)

    whole = microseconds(step, times)
    follow = statistics.median(followed[WARM_UP:])
    clock = iter(range(10**9))
    look = microseconds(lambda: desk.look(lambda: sights, float(next(clock))), times)
    latencies, sequence = Latencies(), core.running.sequences()[0]
    output, arrays = Output(sequence), core.running.rows
    output.finish, output.known = "length", PROMPT + 100

    def start_and_end() -> None:
        latencies.started([sequence], 1.0)
        latencies.applied(arrays, 2.0)
        latencies.ended(output, 3.0)

    each = microseconds(start_and_end, times)
    return {"step": whole - follow, "follow": follow, "start_and_end": each, "look": look}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", default="1,64,256,1024")
    parser.add_argument("--blocks", default="20000,1000000")
    parser.add_argument("--times", type=int, default=200)
    options = parser.parse_args()
    found = []
    print("   rows     blocks      step    follow  start_and_end      look")
    for rows in map(int, options.rows.split(",")):
        for blocks in map(int, options.blocks.split(",")):
            cost = measure(rows, blocks, options.times)
            found.append({"rows": rows, "blocks": blocks, **cost})
            print(
                f"{rows:7,} {blocks:10,} {cost['step']:9.1f} {cost['follow']:9.2f} "
                f"{cost['start_and_end']:14.2f} {cost['look']:9.1f}"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
