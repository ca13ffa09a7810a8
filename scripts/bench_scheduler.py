#!/usr/bin/env python
"""What the control plane costs: microseconds of one core, no model, no sockets, the real codec.

    bench_scheduler.py [--json] [--rows 1,64,256,1024,4096] [--steps 200]

A steady decode step is everything the scheduler process computes for it: compose the plan, encode it, decode rank 0's
result, commit it. Every row decodes greedily behind a context of about 1,024 tokens in blocks of 16, prefix cache on,
so that in each step a sixteenth of the rows takes a new block and publishes a full one. Medians after warm-up.
Admission is `add` + `plan` (+ encode) of a request with a prompt of 2,048 tokens, nothing cached or all of it;
abort is that of a running sequence of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from time import perf_counter_ns

import numpy as np

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.transport.codec import engine_codec, pack, rank_codec
from treadle.transport.messages import SamplingParams, StepPlan, StepResult, Submit

VOCAB = 50_000
CONTEXT = 1_024
PROMPT = 2_048
BLOCK = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


def make_core(rows: int, max_len: int, budget: int, spare_blocks: int) -> Core:
    blocks = rows * -(-max_len // BLOCK) + spare_blocks + 1
    config = CoreConfig(
        num_blocks=blocks,
        block_size=BLOCK,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_model_len=max_len,
        vocab_size=VOCAB,
        eos_token_ids=(0,),
        max_waiting_requests=1 << 20,
        max_waiting_tokens=1 << 40,
    )
    return Core(config, draw_seed=lambda: 1)


def answer(plan: StepPlan, sampling: int) -> bytes:
    """An encoded result: the same token for everybody, never EOS."""
    tokens = pack(np.full(sampling, plan.step % (VOCAB - 1) + 1, np.int32))
    return engine_codec().encode(StepResult(plan.step, 0, 0, tokens, 0))


class Clock:
    """Collects nanoseconds per part; `lap` names what has just been done."""

    def __init__(self) -> None:
        self.laps: dict[str, list[int]] = {}
        self._at = 0

    def start(self) -> None:
        self._at = perf_counter_ns()

    def lap(self, name: str) -> None:
        now = perf_counter_ns()
        self.laps.setdefault(name, []).append(now - self._at)
        self._at = perf_counter_ns()


def steady_decode(rows: int, steps: int, warm_up: int = 40) -> dict[str, float]:
    """Median µs per part and in all, at pipeline depth 2 as it runs: plan N+1, then apply N."""
    max_len = CONTEXT + BLOCK + steps + warm_up + 8
    core = make_core(rows, max_len, budget=rows * max_len, spare_blocks=rows)
    plans, results = rank_codec(), engine_codec()
    random = np.random.default_rng(0)
    for i in range(rows):
        prompt = random.integers(1, VOCAB, CONTEXT + i % BLOCK)
        core.add(Submit(id=str(i), tokens=pack(prompt), params=GREEDY), 0.0)
    waiting = [answer(_next_plan(core), rows)]  # one great step of prefills
    clock = Clock()
    gc.collect()
    for step in range(steps + warm_up):
        if step == warm_up:
            clock.laps.clear()
        clock.start()
        plan = _next_plan(core)
        clock.lap("plan")
        plans.encode(plan)
        clock.lap("encode")
        waiting.append(answer(plan, rows))
        clock.start()
        result = results.decode(waiting.pop(0))
        clock.lap("decode")
        assert isinstance(result, StepResult)
        outputs = core.apply(result, 0.0)
        clock.lap("apply")
        assert len(outputs.tokens) == rows
    parts = {name: statistics.median(laps) / 1e3 for name, laps in clock.laps.items()}
    whole = [sum(laps) for laps in zip(*clock.laps.values(), strict=False)]
    return {"total": statistics.median(whole) / 1e3, **parts}


def _next_plan(core: Core) -> StepPlan:
    plan = core.plan(0.0)
    assert plan is not None
    return plan


def admission(cached: bool, repeats: int = 200) -> float:
    """Median µs of add + plan + encode of one 2,048-token prompt."""
    core = make_core(64, PROMPT + 64, budget=PROMPT + 64, spare_blocks=256)
    random = np.random.default_rng(1)
    codec = rank_codec()
    fixed = pack(random.integers(1, VOCAB, PROMPT))

    def once(name: str, prompt: bytes) -> int:
        began = perf_counter_ns()
        core.add(Submit(id=name, tokens=prompt, params=GREEDY), 0.0)
        plan = _next_plan(core)
        codec.encode(plan)
        took = perf_counter_ns() - began
        core.apply(StepResult(plan.step, 0, 0, pack([1]), 0), 0.0)
        core.abort(name, 0.0)
        return took

    once("first", fixed)
    prompts = [fixed if cached else pack(random.integers(1, VOCAB, PROMPT)) for _ in range(repeats)]
    return statistics.median(once(str(i), prompt) for i, prompt in enumerate(prompts)) / 1e3


def abort(repeats: int = 200) -> float:
    """Median µs of aborting a running sequence of 2,048 tokens."""
    core = make_core(8, PROMPT + 64, budget=PROMPT + 64, spare_blocks=256)
    random = np.random.default_rng(2)
    times = []
    for i in range(repeats):
        core.add(Submit(id=str(i), tokens=pack(random.integers(1, VOCAB, PROMPT)), params=GREEDY), 0.0)
        plan = _next_plan(core)
        core.apply(StepResult(plan.step, 0, 0, pack([1]), 0), 0.0)
        began = perf_counter_ns()
        core.abort(str(i), 0.0)
        times.append(perf_counter_ns() - began)
    return statistics.median(times) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rows", default="1,64,256,1024,4096", help="row counts, separated by commas")
    parser.add_argument("--steps", type=int, default=200, help="measured steps for each row count")
    options = parser.parse_args()
    report: dict[str, object] = {
        "unit": "us",
        "decode_step": {rows: steady_decode(int(rows), options.steps) for rows in options.rows.split(",")},
        "admission_2048_cold": admission(cached=False),
        "admission_2048_cached": admission(cached=True),
        "abort_2048": abort(),
    }
    if options.json:
        print(json.dumps(report))
    else:
        _print_table(report)
    return 0


def _print_table(report: dict[str, object]) -> None:
    steps = report["decode_step"]
    assert isinstance(steps, dict)
    print(f"{'rows':>6} {'total':>9} {'plan':>9} {'encode':>9} {'decode':>9} {'apply':>9}   µs per decode step")
    for rows, parts in steps.items():
        values = (parts[name] for name in ("total", "plan", "encode", "decode", "apply"))
        print(f"{rows:>6} " + " ".join(f"{value:9.1f}" for value in values))
    for name in ("admission_2048_cold", "admission_2048_cached", "abort_2048"):
        print(f"{name}: {report[name]:.1f} µs")


if __name__ == "__main__":
    sys.exit(main())
