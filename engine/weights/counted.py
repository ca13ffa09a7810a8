"""Says how far the reading of weights has come."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from .source import Shape, StoredBlocks, WeightSource

_EVERY = 0.2


class Counted:
    """A `WeightSource` that tells `report` (bytes done, bytes in all) as it is read.

    total: bytes of the matrices that will be read, as numbers of `dtype`, which is also how stored blocks are counted;
    a tensor counts as done when the next one is asked for. now: a clock, seconds. Reports are at least 0.2 s apart,
    except the first, before anything is read, and the last, which `finish` makes.
    """

    def __init__(
        self,
        source: WeightSource,
        total: int,
        dtype: torch.dtype,
        report: Callable[[int, int], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._total = total
        self._dtype = dtype
        self._report = report
        self._now = now
        self._bytes: dict[str, int] = {}
        self._next = -math.inf

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def shape(self, name: str) -> Shape:
        return self._source.shape(name)

    def read(
        self, name: str, dtype: torch.dtype, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        self._begin(name, dim, start, stop)
        return self._source.read(name, dtype, dim, start, stop)

    def blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> StoredBlocks | None:
        self._begin(name, dim, start, stop)
        return self._source.blocks(name, dim, start, stop)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def finish(self) -> None:
        self._report(self._total, self._total)

    def _begin(self, name: str, dim: int, start: int, stop: int | None) -> None:
        now = self._now()
        if now >= self._next:
            self._next = now + _EVERY
            self._report(min(sum(self._bytes.values()), self._total), self._total)
        shape = list(self._source.shape(name))
        if len(shape) > 1:  # the others are small, and not in the total
            shape[dim] = (shape[dim] if stop is None else stop) - start
            self._bytes[name] = math.prod(shape) * self._dtype.itemsize
