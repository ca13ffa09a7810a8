"""Sums of one half of a step's tokens on a stream of their own, while the other half is computed.

A large sum over the ranks takes as long as the links take, and the products leave the links idle. Of two halves of the
tokens one is always at its products while the other one is summed; the idea is DeepSeek-V3's for expert parallelism
(section 3.2.3 of its report, 2024), here for tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HALVES = 2
# What torch's kernels of symmetric memory sum.
DTYPES = (torch.bfloat16, torch.float32)
_ALIGNMENT = 16


class SideSums:
    """memory: uint8, mapped by every rank; each half has its part. reduce: sums in place what lies there, a collective.

    All ranks start the same sums in the same order. Between the first `start` and the last `wait` no other collective
    may run: sums share the flags by which the ranks meet.
    """

    def __init__(self, memory: Tensor, reduce: Callable[[Tensor], None]) -> None:
        device = memory.device
        self._parts = memory.chunk(HALVES)
        self._reduce = reduce
        # Before others, so that a sum gets its few multiprocessors as soon as a product leaves some.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self._computed = [torch.cuda.Event() for _ in range(HALVES)] if self._stream else []
        self._summed = [torch.cuda.Event() for _ in range(HALVES)] if self._stream else []

    def fits(self, tokens: int, width: int, dtype: torch.dtype) -> bool:
        """Whether each half may have so many tokens."""
        row = width * dtype.itemsize
        return dtype in DTYPES and row % _ALIGNMENT == 0 and tokens * row <= self._parts[0].numel()

    def part(self, half: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Where that half is to be computed, and summed."""
        return self._parts[half][: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    def start(self, half: int, part: Tensor) -> None:
        """Sums what was computed into `part`, beside what follows on this stream."""
        if self._stream is None:
            self._reduce(part)
            return
        self._computed[half].record()
        self._stream.wait_event(self._computed[half])
        with torch.cuda.stream(self._stream):
            self._reduce(part)
            self._summed[half].record()

    def wait(self, half: int) -> None:
        """What follows on this stream sees the sum, and may overwrite it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._summed[half])
