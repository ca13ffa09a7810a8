#!/usr/bin/env python
"""How fast the simulator is: one replica of an 8B model's step costs, 256 rows, on one core.

    bench_simulator.py [--lengths FILE] [--rate 110] [--seconds 30] [--runs 5] [--against TREE] [--json]

Lengths are drawn from a file of JSON lines [input, output], or from a log-normal mixture like that of chats; requests
arrive at --rate per second for --seconds (at 110 the queue grows), and are simulated to their end, with as few
collections of garbage as `treadle simulate` has. cpu: seconds of user time, so other work on the machine counts little.
speed: simulated seconds for each of them. step: µs of it.

--against: another checkout of this repository, or a directory in which it was installed (`pip install --no-deps
--target DIR`), in alternation with this one, each run in a process of its own; the ratio is of medians. `same`: both
gave every request the same times. compiled: the form of the scheduler (docs/decisions/015-compiled-scheduler.md).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from treadle.scheduler import core
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.simulation import PRESETS
from treadle.scheduler.simulation.garbage import few_collections
from treadle.scheduler.simulation.replica import Replica
from treadle.scheduler.simulation.workload import Process, draw_workload, read_lengths

HERE = Path(__file__).resolve()
CONFIG = CoreConfig(
    num_blocks=26_000,
    vocab_size=32_768,
    max_model_len=8_192,
    max_num_seqs=256,
    max_waiting_requests=1 << 20,
    max_waiting_tokens=1 << 40,
)


def lengths(path: Path | None) -> list[tuple[int, int]]:
    if path is not None:
        return read_lengths(path)
    random = np.random.default_rng(0)
    inputs, outputs = random.lognormal(4.9, 1.1, 1_000), random.lognormal(4.9, 1.0, 1_000)
    return list(
        zip(inputs.astype(int).clip(4, 1_024).tolist(), outputs.astype(int).clip(4, 1_024).tolist(), strict=True)
    )


def once(options: argparse.Namespace) -> dict[str, Any]:
    workload = draw_workload(lengths(options.lengths), Process(rate=options.rate, seconds=options.seconds))
    replica = Replica(CONFIG, next(iter(PRESETS.values())), workload)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with few_collections():
        result = replica.run()
    cpu = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
    return {
        "cpu": cpu,
        "simulated": result.seconds,
        "steps": result.steps,
        "rows": result.row_seconds / result.busy,
        "compiled": not core.__file__.endswith(".py"),  # `is_compiled` is not in older checkouts
        "times": hashlib.sha256(result.first + result.finish).hexdigest(),
    }


def in_tree(tree: Path, arguments: list[str]) -> dict[str, Any]:
    """This script with the package of that tree."""
    command = [sys.executable, str(HERE), "--once", *arguments]
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, cwd=tree, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def told(runs: list[dict[str, Any]]) -> dict[str, float | bool]:
    cpu = statistics.median(run["cpu"] for run in runs)
    first = runs[0]
    return {
        "cpu": round(cpu, 3),
        "simulated": round(first["simulated"], 1),
        "speed": round(first["simulated"] / cpu, 1),
        "step": round(cpu / first["steps"] * 1e6, 1),
        "rows": round(first["rows"], 1),
        "compiled": first["compiled"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=Path, help="JSON lines [input, output]")
    parser.add_argument("--rate", type=float, default=110.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(once(options)))
        return 0
    arguments = ["--rate", str(options.rate), "--seconds", str(options.seconds)]
    if options.lengths is not None:
        arguments += ["--lengths", str(options.lengths.resolve())]
    trees = [HERE.parent.parent] + ([options.against.resolve()] if options.against is not None else [])
    runs: list[list[dict[str, Any]]] = [[] for _ in trees]
    for _ in range(options.runs):
        for tree, into in zip(trees, runs, strict=True):
            into.append(in_tree(tree, arguments))
    report: dict[str, Any] = {"this": told(runs[0])}
    if len(trees) > 1:
        report["other"] = told(runs[1])
        report["ratio"] = round(report["other"]["cpu"] / report["this"]["cpu"], 3)
        report["same"] = runs[0][0]["times"] == runs[1][0]["times"]
    if options.json:
        print(json.dumps(report))
    else:
        for name, part in report.items():
            print(f"{name:>6}: {part}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
