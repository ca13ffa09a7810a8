#!/usr/bin/env python
"""What an event log costs: microseconds and bytes of a steady decode step, with and without, alternating.

    bench_event_log.py [--json] [--rows 1,64,256,1024,4096] [--steps 200] [--directory DIR]

A step is what the service asks of the core: plan, apply, and the plan that finds the pipeline full. Every row decodes.
The file is written where --directory says (default: the temporary directory). Medians after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import deque
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.event_log import EventWriter
from treadle.scheduler.recording import RecordedCore
from treadle.transport.codec import pack
from treadle.transport.messages import SamplingParams, StepPlan, StepResult, Submit

VOCAB = 50_000
PROMPT = 64
WARM_UP = 40
FOREVER = SamplingParams(temperature=0.0, max_tokens=None, seed=0)


class Stepper:
    """A core whose rows all decode, with a full pipeline."""

    def __init__(self, core: Core | RecordedCore, rows: int) -> None:
        self._core = core
        self._tokens = pack(np.arange(rows) % VOCAB)
        self._flights: deque[StepPlan] = deque()
        for i in range(rows):
            prompt = (np.arange(PROMPT) * (i + 1)) % VOCAB
            core.add(Submit(id=str(i), tokens=pack(prompt), params=FOREVER), 0.0)
        self._plan()

    def _plan(self) -> None:
        while (plan := self._core.plan(0.0)) is not None:
            self._flights.append(plan)

    def step(self) -> float:
        """Microseconds."""
        result = StepResult(self._flights.popleft().step, 0, 0, self._tokens, 20_000)
        began = perf_counter_ns()
        self._core.apply(result, 0.0, 0.02)
        self._plan()
        return (perf_counter_ns() - began) / 1e3


def measure(rows: int, steps: int, directory: Path) -> dict[str, float]:
    length = PROMPT + steps + WARM_UP + 8
    config = CoreConfig(
        num_blocks=rows * -(-length // 16) * 2 + 2,
        max_num_seqs=rows,
        max_num_batched_tokens=rows * PROMPT,
        max_model_len=length,
        vocab_size=VOCAB,
        max_waiting_requests=1 << 20,
        reserve_output="none",
    )
    path = directory / "events"
    writer = EventWriter(path)
    plain = Stepper(Core(config, lambda: 0), rows)
    recorded = Stepper(RecordedCore(config, lambda: 0, writer), rows)
    for _ in range(WARM_UP):
        plain.step(), recorded.step()
    before = path.stat().st_size
    pairs = [(plain.step(), recorded.step()) for _ in range(steps)]
    written = path.stat().st_size - before
    writer.close()
    path.unlink()
    return {
        "without_us": statistics.median(without for without, _ in pairs),
        "with_us": statistics.median(recording for _, recording in pairs),
        "added_us": statistics.median(recording - without for without, recording in pairs),
        "bytes": written / steps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rows", default="1,64,256,1024,4096", help="row counts, separated by commas")
    parser.add_argument("--steps", type=int, default=200, help="measured steps for each row count")
    parser.add_argument("--directory", type=Path, default=None, help="where the log is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        found = {rows: measure(int(rows), options.steps, Path(directory)) for rows in options.rows.split(",")}
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{'rows':>6} {'without':>9} {'with':>9} {'added':>9}   µs per decode step; bytes of log per step")
    for rows, row in found.items():
        print(f"{rows:>6} {row['without_us']:9.1f} {row['with_us']:9.1f} {row['added_us']:9.1f}   {row['bytes']:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
