"""Blocks of K/V that moved from the device to host memory, of one rank, and the copies that plans ask for."""

from __future__ import annotations

import math
import time
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from treadle.errors import ProtocolError
from treadle.transport.codec import unpack
from treadle.transport.messages import StepPlan

from .kv import KVCache, zeros

Pairs = npt.NDArray[np.int32]
"""[n, 2]: from and to."""
_MEASURED = 16


class BlockCopies(Protocol):
    """What moves blocks. `blocks`: of host memory."""

    @property
    def blocks(self) -> int: ...

    def run(self, plan: StepPlan) -> None:
        """The plan's copies: all out, then all in. Raises ProtocolError for blocks that are not there, or come twice.

        Whatever is launched on the device after it finds the blocks in place.
        """
        ...

    def copy_out(self, pairs: Pairs) -> None:
        """pairs: (device block, host block)."""
        ...

    def copy_in(self, pairs: Pairs) -> None:
        """pairs: (host block, device block)."""
        ...

    def wait(self) -> None:
        """Until everything has arrived."""
        ...


class HostBlocks:
    """`BlockCopies` of a cache that lies in host memory itself.

    host: [blocks, layers, 2, kv_heads, block_size, head_dim].
    poison: a block that was moved is filled with NaN where it was, so that a read there shows.
    """

    def __init__(self, kv: KVCache, blocks: int, *, poison: bool = False) -> None:
        self.blocks = blocks
        self._kv = kv
        self._poison = poison
        layers, two, _, *inner = kv.storage.shape
        self.host = zeros((blocks, layers, two, *inner), kv.dtype, torch.device("cpu"))

    def run(self, plan: StepPlan) -> None:
        out, back = checked_copies(plan, self._kv.num_blocks, self.blocks)
        self.copy_out(out)
        self.copy_in(back)

    def copy_out(self, pairs: Pairs) -> None:
        for block, place in pairs.tolist():
            there = self._kv.storage[:, :, block]
            self.host[place].copy_(there)
            if self._poison:
                there.fill_(math.nan)

    def copy_in(self, pairs: Pairs) -> None:
        for place, block in pairs.tolist():
            self._kv.storage[:, :, block].copy_(self.host[place])
            if self._poison:
                self.host[place].fill_(math.nan)

    def wait(self) -> None:
        return


def checked_copies(plan: StepPlan, num_blocks: int, host_blocks: int) -> tuple[Pairs, Pairs]:
    """The plan's copies out and in. Raises ProtocolError."""
    out, back = _pairs(plan.copy_out), _pairs(plan.copy_in)
    for device, host in ((out[:, 0], out[:, 1]), (back[:, 1], back[:, 0])):
        for what, blocks, low, end in (("device", device, 1, num_blocks), ("host", host, 0, host_blocks)):
            if blocks.size and (blocks.min() < low or blocks.max() >= end or np.unique(blocks).size < blocks.size):
                raise ProtocolError(
                    f"copies of {what} blocks {blocks.tolist()}: each from {low} to {end - 1}, and once"
                )
    return out, back


def _pairs(data: bytes) -> Pairs:
    numbers = unpack(data)
    if numbers.size % 2:
        raise ProtocolError(f"{numbers.size} numbers where pairs of blocks were expected")
    return numbers.reshape(-1, 2)


def measure(copies: BlockCopies, num_blocks: int) -> tuple[float, float]:
    """Seconds that a block takes out, and in; zeros without host memory. Blocks 1 on and host blocks 0 on hold nothing.

    The second of two rounds counts: in the first, memory is touched for the first time.
    """
    count = min(_MEASURED, copies.blocks, num_blocks - 1)
    if not count:
        return 0.0, 0.0
    device, host = np.arange(1, count + 1, dtype=np.int32), np.arange(count, dtype=np.int32)
    seconds = (0.0, 0.0)
    for _ in range(2):
        began = time.perf_counter()
        copies.copy_out(np.stack((device, host), 1))
        copies.wait()
        between = time.perf_counter()
        copies.copy_in(np.stack((host, device), 1))
        copies.wait()
        seconds = ((between - began) / count, (time.perf_counter() - between) / count)
    return seconds


def flat_blocks(storage: Tensor) -> Tensor:
    """[layers, 2, blocks, …] as [layers · 2 · blocks, words], in the widest words that fit: the same memory."""
    layers, two, blocks, *inner = storage.shape
    rows = storage.view(layers * two * blocks, math.prod(inner))
    return rows.view(torch.int64) if rows.shape[1] * rows.element_size() % 8 == 0 else rows
