"""What a GPU can do at most: bytes moved and multiplications done per second, measured on it now.

    python scripts/gpu_limits.py [--json FILE]

A copy of 4 GiB within the GPU's memory, counting what is read and what is written, and a bfloat16 product of random
8192 x 8192 matrices; medians. On zeros the product would be faster: they switch fewer transistors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

_COPY_BYTES = 4 << 30
_SIDE = 8192
_REPEATS = 20


def median_seconds(action: Callable[[], object]) -> float:
    for _ in range(3):
        action()
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copied() -> float:
    """Bytes per second."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / median_seconds(lambda: target.copy_(source))


def multiplied() -> float:
    """FLOP per second."""
    a, b = (torch.randn(_SIDE, _SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * _SIDE**3 / median_seconds(lambda: a @ b)


def measure() -> dict[str, object]:
    return {
        "mode": "limits",
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_s": round(copied() / 1e12, 3),
        "bf16_tflop_s": round(multiplied() / 1e12, 1),
        "torch": torch.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    line = json.dumps(measure())
    print(line)
    if options.json is not None:
        options.json.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
