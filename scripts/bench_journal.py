"""What the journal costs: microseconds per accepted request, per step of so many rows, and of one fsync.

    python scripts/bench_journal.py --json journal.json

Measured on the file system of `--directory`: an fsync is as slow as the disk is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--times", type=int, default=2_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        result = asyncio.run(measure(Path(made), options.times))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
