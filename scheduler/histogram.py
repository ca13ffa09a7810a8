"""Counts in fixed buckets: what Prometheus calls a histogram, at the price of a look-up."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

from treadle.transport.messages import HistogramFigures

Float64 = npt.NDArray[np.float64]

# Seconds of a request: vLLM's buckets, with shorter ones below them.
REQUEST_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0),
)
PHASE_SECONDS = tuple(float(f"{step}e{power}") for power in range(-5, 1) for step in (1, 2.5, 5))
RECOVERY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)  # vLLM's
STEP_ROWS = tuple(float(1 << power) for power in range(13))


class Histogram:
    """bounds: upper ends of the buckets, ascending, each inclusive; one more bucket has the rest. total: of values."""

    __slots__ = ("_array", "bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._array = np.array(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def observe_all(self, values: Float64) -> None:
        """Many at once, for little more than one."""
        found = np.bincount(np.searchsorted(self._array, values), minlength=len(self.counts)).tolist()
        self.counts = [old + new for old, new in zip(self.counts, found, strict=True)]
        self.total += float(values.sum())

    @property
    def count(self) -> int:
        return sum(self.counts)

    def figures(self, name: str, phase: str = "") -> HistogramFigures:
        return HistogramFigures(name, phase, list(self.bounds), list(self.counts), self.total)
