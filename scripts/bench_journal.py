"""What the journal costs: microseconds per accepted request, per step of so many rows, and of one fsync; and to write a
large one anew, which leaves out what has ended: seconds in all, and how long the loop stood still at most.

    python scripts/bench_journal.py --json journal.json

Measured on the file system of `--directory`: an fsync is as slow as the disk is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from treadle.scheduler.journal import Journal
from treadle.transport.codec import pack
from treadle.transport.messages import SamplingParams, Submit

_ROWS = (1, 16, 64, 256)
_HOUR = 3600.0
_OPEN = 10_000
_STEP_ROWS = 256
_TICK = 0.001


def median_us(work: Callable[[], None], times: int) -> float:
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return round(statistics.median(took) * 1e6, 2)


async def measure(directory: Path, times: int) -> dict[str, float]:
    journal = Journal(directory / "journal", _HOUR)  # no fsync but our own
    submit = Submit(id="a" * 32, tokens=pack(range(512)), params=SamplingParams(seed=1), key="b" * 32)

    def accept() -> None:
        journal.accept(submit)
        journal.flush()

    def step(rows: int) -> None:
        for row in range(rows):
            journal.token(row, 0, 12_345)
        journal.flush()

    result = {"accept_512_tokens_us": median_us(accept, times)}
    for rows in _ROWS:
        result[f"step_{rows}_rows_us"] = median_us(lambda rows=rows: step(rows), times)  # type: ignore[misc]
    file = os.open(directory / "journal", os.O_WRONLY | os.O_APPEND)

    def sync() -> None:
        os.write(file, b"\0" * 1024)
        os.fsync(file)

    result["fsync_us"] = median_us(sync, min(times, 50))
    os.close(file)
    await journal.close()
    return result


async def measure_compaction(directory: Path, megabytes: int) -> dict[str, float]:
    """Of a journal with 10,000 open requests of 512 tokens, and as many tokens of theirs as fit."""
    path = directory / "large"
    journal = Journal(path, _HOUR)
    submit = Submit(id="a" * 32, tokens=pack(range(512)), params=SamplingParams(seed=1), key="b" * 32)
    for _ in range(_OPEN):
        journal.accept(submit)
    journal.flush()
    size = path.stat().st_size
    steps = max(1, ((megabytes << 20) - size) // (12 * _STEP_ROWS))
    journal._compact_at = 1 << 60
    for step in range(steps):
        for row in range(_STEP_ROWS):
            journal.token((step * _STEP_ROWS + row) % _OPEN, 0, 12_345)
        journal.flush()
    before = os.stat(path).st_ino
    journal._compact_at = 1
    began = last = time.perf_counter()
    longest, cpu = 0.0, time.process_time()
    while os.stat(path).st_ino == before:
        journal.token(0, 0, 1)
        journal.flush()
        await asyncio.sleep(_TICK)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    result = {
        "compaction_mib": round(size / (1 << 20) + steps * 12 * _STEP_ROWS / (1 << 20)),
        "compaction_s": round(last - began, 2),
        "compaction_cpu_s": round(time.process_time() - cpu, 2),
        "compaction_longest_stall_ms": round((longest - _TICK) * 1e3, 1),
        "compaction_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    await journal.close()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--times", type=int, default=2_000)
    parser.add_argument("--megabytes", type=int, default=256, help="of the journal that is written anew")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        result = asyncio.run(measure(Path(made), options.times))
        result |= asyncio.run(measure_compaction(Path(made), options.megabytes))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
