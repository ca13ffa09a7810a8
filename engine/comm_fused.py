"""Sums over the GPUs of one machine that add the residual and take the norm in the same launch.

The parts lie in two slots that take turns. A rank writes a slot again only after a sum through the other one, and that
sum began nowhere before the first had ended there; so one meeting of the ranks is enough for each sum, before it. A
decoder layer has two sums, and each has its slot for good: the turns are right however layers, steps and graphs follow
each other.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Communicator

logger = logging.getLogger(__name__)

SLOTS = 2
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLAG_BYTES = 16 << 10
_MOST_RANKS = 16


class FusedSums(Protocol):
    """What a layer needs: the same calls on every rank, with equal shapes, the slots in turns."""

    def slot(self, turn: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        """Where to write this rank's part; None where the sum has to be taken otherwise."""
        ...

    def add_norm(self, part: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds the sum of all parts, each in the same slot, to residual [T, hidden] in place; returns its norm."""
        ...


class SymmetricSums:
    """memory: uint8 [at least `needed(limit)`], zeros, mapped by every rank; addresses: where, for this one, by rank.

    limit: bytes of a part at most.
    """

    def __init__(self, memory: Tensor, addresses: list[int], rank: int, limit: int) -> None:
        self._memory = memory
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=memory.device)
        self._rank = rank
        self._limit = limit

    @staticmethod
    def needed(limit: int) -> int:
        return SLOTS * limit + _FLAG_BYTES

    def slot(self, turn: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
        size = shape[0] * shape[1] * dtype.itemsize
        if not 0 < size <= self._limit or dtype not in _DTYPES or shape[1] * dtype.itemsize % 16:
            return None
        first = turn % SLOTS * self._limit
        return self._memory[first : first + size].view(dtype).view(shape)

    def add_norm(self, part: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        from .kernels.sums import sum_add_norm

        out = torch.empty_like(residual)
        offset, flags = part.data_ptr() - self._memory.data_ptr(), SLOTS * self._limit
        sum_add_norm(self._addresses, offset, flags, self._rank, residual, weight, out, eps)
        return out


def make_sums(comm: Communicator, device: torch.device, limit: int) -> SymmetricSums | None:
    """A collective. None where any rank has no symmetric memory, or where a first sum is wrong. limit: bytes."""
    sums: SymmetricSums | None = None
    try:
        sums = _with_symmetric_memory(comm, device, limit)
    except (RuntimeError, ImportError, AttributeError) as error:
        logger.warning("rank %d has no fused sums: %s", comm.rank, error)
    if not _unanimous(sums is not None, comm, device) or sums is None:
        return None
    right = all(_right(sums, comm, device, turn, rows) for turn, rows in ((0, 1), (1, 3), (0, 40), (1, 300)))
    if not _unanimous(right, comm, device):
        logger.warning("fused sums are wrong here: sums and norms go apart")
        return None
    return sums


def _with_symmetric_memory(comm: Communicator, device: torch.device, limit: int) -> SymmetricSums:
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    import torch.distributed._symmetric_memory as symmetric

    if comm.world_size > _MOST_RANKS or limit % 16:
        raise RuntimeError(f"not for {comm.world_size} ranks and parts of {limit} bytes")
    memory = symmetric.empty(SymmetricSums.needed(limit), dtype=torch.uint8, device=device).zero_()
    handle = symmetric.rendezvous(memory, dist.group.WORLD.group_name)
    shift = memory.data_ptr() - handle.buffer_ptrs[comm.rank]
    return SymmetricSums(memory, [address + shift for address in handle.buffer_ptrs], comm.rank, limit)


def _right(sums: SymmetricSums, comm: Communicator, device: torch.device, turn: int, rows: int) -> bool:
    """Small whole numbers, so that the order of the additions does not show."""
    generator = torch.Generator(device).manual_seed(rows + comm.rank)
    x = torch.randint(-8, 9, (rows, 256), generator=generator, device=device).to(torch.bfloat16)
    part = sums.slot(turn, (rows, 256), x.dtype)
    if part is None:
        return True
    expected = comm.all_reduce(x.clone()) + 1
    part.copy_(x)
    residual, weight = torch.ones_like(x), torch.full_like(x[0], 2)
    normed = sums.add_norm(part, residual, weight, 0.5)
    wide = expected.float()
    exact = 2 * wide * (wide.square().mean(-1, keepdim=True) + 0.5).rsqrt()
    return torch.equal(residual, expected) and torch.allclose(normed.float(), exact, rtol=0.02, atol=0.02)


def _unanimous(mine: bool, comm: Communicator, device: torch.device) -> bool:
    votes = comm.all_reduce(torch.tensor([float(mine)], device=device))
    return int(votes.item()) == comm.world_size
