"""Times in buckets that are 2% wide: for what there is one of per token, which would be too many to keep."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Final

import numpy as np

_LEAST: Final = 1e-6
_WIDTH: Final = log(1.02)
_BUCKETS: Final = int(log(1e10) / _WIDTH)


class Histogram:
    """From a microsecond to three hours; what is outside is in the first or the last bucket."""

    def __init__(self, counts: Sequence[int] | None = None) -> None:
        self.counts = list(counts) if counts is not None else [0] * _BUCKETS

    def add(self, seconds: float, weight: int) -> None:
        self.counts[_bucket(seconds)] += weight

    def merge(self, other: Histogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]

    def percentile(self, percent: float) -> float:
        """Seconds, the middle of the bucket; 0 when nothing was added."""
        sums = np.cumsum(self.counts)
        if not sums[-1]:
            return 0.0
        bucket = int(np.searchsorted(sums, sums[-1] * percent / 100))
        return float(_LEAST * np.exp((min(bucket, _BUCKETS - 1) + 0.5) * _WIDTH))

    def share_within(self, seconds: float) -> float:
        """Of all that was added, how much is in the bucket of `seconds` or before it; 1 when nothing was added."""
        total = sum(self.counts)
        return sum(self.counts[: _bucket(seconds) + 1]) / total if total else 1.0

    def mean(self) -> float:
        counts = np.array(self.counts, np.float64)
        middles = _LEAST * np.exp((np.arange(_BUCKETS) + 0.5) * _WIDTH)
        return float(counts @ middles / counts.sum()) if counts.any() else 0.0


def _bucket(seconds: float) -> int:
    bucket = int(log(seconds / _LEAST) / _WIDTH) if seconds > _LEAST else 0
    return min(bucket, _BUCKETS - 1)
