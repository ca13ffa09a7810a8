"""Collectives between the GPUs of one machine, through memory that all of them map.

A small message costs NCCL ten microseconds and more. Here every GPU reads its peers' parts directly and adds them up
itself ("one shot"), in one kernel of torch's symmetric memory. Of a larger message each GPU adds up its share and
writes the sum to all ("two shot"), in place. Multicast is never used: it is switched off before the first rendezvous,
and no `multimem` operation is called.
"""

from __future__ import annotations

import logging
import os
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .comm import Communicator, TorchComm
from .comm_fused import FusedSums, make_sums
from .comm_side import DTYPES, HALVES, SideSums

logger = logging.getLogger(__name__)

# Up to so many bytes one shot wins, by number of GPUs; measured by scripts/bench_comm.py for two of them.
ONE_SHOT_BYTES = {2: 1 << 20, 3: 512 << 10, 4: 256 << 10}
_ONE_SHOT_OF_MANY = 256 << 10
# Up to so many, two shots, where the memory is there.
TWO_SHOT_BYTES = 64 << 20
_GATHER_BYTES = 64 << 10
_ALIGNMENT = 16


class OneShot(Protocol):
    """What the communicator needs of symmetric memory; a test puts its own behind it."""

    buffer: Tensor

    def reduce(self, staged: Tensor, out: Tensor) -> None:
        """out = the sum over the ranks of `staged`, which lies in `buffer` at the same place on every rank."""
        ...

    def reduce_in_place(self, staged: Tensor) -> None:
        """staged = that sum."""
        ...


class SymmetricBuffer:
    """`buffer`: [size] uint8 at an address that every rank of the group maps. Making one is a collective."""

    def __init__(self, size: int, device: torch.device, group: str) -> None:
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        import torch.distributed._symmetric_memory as symmetric

        self.buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        self._group = group
        symmetric.rendezvous(self.buffer, group)

    def reduce(self, staged: Tensor, out: Tensor) -> None:
        # Not the variant that also copies its input in: within a block it signals the peers before all of the block's
        # threads have written, as far as its source shows. A copy in a kernel of its own is safe, and a product that
        # writes to `staging` needs none.
        torch.ops.symm_mem.one_shot_all_reduce_out(staged, "sum", self._group, out)

    def reduce_in_place(self, staged: Tensor) -> None:
        # Blocks of all ranks meet before and after. An element is read and written by one block of one rank alone, and
        # the second meeting says that it has arrived; so `staged` may be read, and written, once the kernel has ended.
        torch.ops.symm_mem.two_shot_all_reduce_(staged, "sum", self._group)


class SymmetricComm:
    """A Communicator: one shot up to `limit` bytes of bfloat16 or float32, two up to `two_shot`, else the given one.

    Its kernels can be captured in CUDA graphs. Like the rest of a step, calls run on one stream, in the same order on
    every rank; a kernel ends when the peers have read, so the buffer is free for the next call. side: bytes of each
    half for `halves`, 0 for none.
    """

    def __init__(self, base: Communicator, one_shot: OneShot, limit: int, two_shot: int = 0, side: int = 0) -> None:
        self.rank = base.rank
        self.fused: FusedSums | None = None
        self.world_size = base.world_size
        self._base = base
        self._one_shot = one_shot
        self._limit = limit
        self._most = max(limit, two_shot)
        # First sums, whole or in halves, then gathers.
        room = max(self._most, HALVES * side)
        self._room, self._gathers = one_shot.buffer[:room], one_shot.buffer[room:]
        self._sums = self._room[: self._most]
        self.halves = SideSums(self._room[: HALVES * side], one_shot.reduce_in_place) if side else None

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Where to compute what `all_reduce` will sum, so that it need not be copied; None if it would not be used.

        The next `all_reduce` or `staging` overwrites it.
        """
        size = torch.Size(shape).numel() * dtype.itemsize
        return _view(self._sums, shape, dtype) if self._serves(size, dtype, self._most) else None

    def reduce_staged(self, staged: Tensor) -> Tensor:
        """The sum of what was computed into `staging`: a large one stays there, until the next one is overwritten."""
        if staged.nbytes > self._limit:
            self._one_shot.reduce_in_place(staged)
            return staged
        out = torch.empty_like(staged)
        self._one_shot.reduce(staged, out)
        return out

    def owned(self, x: Tensor) -> Tensor:
        """x, or a copy if it lies in `staging`."""
        first = self._room.data_ptr()
        return x.clone() if first <= x.data_ptr() < first + self._room.numel() else x

    def all_reduce(self, x: Tensor) -> Tensor:
        """Like every Communicator's, but what was computed into `staging` comes back in memory of its own."""
        staged = self.staging(tuple(x.shape), x.dtype)
        if staged is None:
            return self._base.all_reduce(x)
        if x.data_ptr() == staged.data_ptr():
            return self.owned(self.reduce_staged(staged))
        staged.copy_(x)
        if staged.nbytes <= self._limit:
            self._one_shot.reduce(staged, x)
            return x
        return x.copy_(self.reduce_staged(staged))

    def all_gather(self, x: Tensor) -> Tensor:
        shape = (self.world_size, *x.shape)
        size = self.world_size * x.numel() * x.dtype.itemsize
        if not self._serves(size, x.dtype, self._gathers.numel()):
            return self._base.all_gather(x)
        # Everyone adds zeros to everyone else's part, which changes no finite number (only the sign of a zero).
        staged = _view(self._gathers, shape, x.dtype).zero_()
        staged[self.rank].copy_(x)
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        self._one_shot.reduce(staged, out)
        return out

    def barrier(self) -> None:
        self._base.barrier()

    @staticmethod
    def _serves(size: int, dtype: torch.dtype, limit: int) -> bool:
        return dtype in DTYPES and 0 < size <= limit and size % _ALIGNMENT == 0


def accelerate(
    comm: Communicator,
    device: torch.device,
    limit: int | None = None,
    two_shot: int = TWO_SHOT_BYTES,
    *,
    fused: bool = True,
    side: bool = True,
) -> Communicator:
    """`comm`, with symmetric memory where all ranks can have it. A collective.

    Checks sums against NCCL's before it trusts the hardware. limit: bytes of one shot, a multiple of 16, None for the
    table's; 0 turns it all off. two_shot: likewise, where it is more. fused: let sums be taken with residual and norm;
    side: let one half of a step be summed while the other is computed, where that works.
    """
    if limit is None:
        limit = ONE_SHOT_BYTES.get(comm.world_size, _ONE_SHOT_OF_MANY)
    if device.type != "cuda" or comm.world_size == 1 or limit <= 0 or not isinstance(comm, TorchComm):
        return comm
    half = two_shot if side and two_shot > limit else 0
    buffer = _shared_buffer(comm, device, max(limit, two_shot, HALVES * half))
    if buffer is None and two_shot > limit:
        half, two_shot, buffer = 0, 0, _shared_buffer(comm, device, limit)
    if buffer is None:
        return comm
    fast = SymmetricComm(comm, buffer, limit, two_shot, half)
    right = all(_sums_like(fast, comm, device, size) for size in (8, 4096, limit // 2))
    if not _unanimous(right, comm, device):
        logger.warning("symmetric memory gives wrong sums here: NCCL does it all")
        return comm
    if two_shot > limit:
        sizes = [min(size, two_shot // 2) for size in (limit // 2 + 8, 3 * (limit // 2) + 24, 4 * limit)]
        if not _unanimous(all(_sums_like(fast, comm, device, size) for size in sizes), comm, device):
            logger.warning("symmetric memory gives wrong sums in two shots here: NCCL takes the large ones")
            fast = SymmetricComm(comm, buffer, limit)
        elif fast.halves is not None:
            halves = fast.halves
            if not _unanimous(_halves_like(halves, comm, device, 4 * limit), comm, device):
                logger.warning("symmetric memory gives wrong sums on a stream of their own: steps stay whole")
                fast.halves = None
    if fused:
        fast.fused = make_sums(comm, device, limit)
    return fast


def _shared_buffer(comm: Communicator, device: torch.device, sums: int) -> SymmetricBuffer | None:
    """Room for sums of so many bytes and for gathers; None if any rank has none."""
    buffer: SymmetricBuffer | None = None
    try:
        buffer = SymmetricBuffer(sums + _GATHER_BYTES, device, dist.group.WORLD.group_name)
    except (RuntimeError, ImportError, AttributeError) as error:
        logger.warning("rank %d has no symmetric memory for sums of %d bytes: %s", comm.rank, sums, error)
    return buffer if _unanimous(buffer is not None, comm, device) else None


def _sums_like(fast: SymmetricComm, comm: Communicator, device: torch.device, size: int) -> bool:
    """Small whole numbers, so that the order of the additions does not show."""
    generator = torch.Generator(device).manual_seed(1 + comm.rank)
    x = torch.randint(-8, 9, (size,), generator=generator, device=device).to(torch.bfloat16)
    expected = comm.all_reduce(x.clone())
    return bool(torch.equal(fast.all_reduce(x.clone()), expected))


def _halves_like(halves: SideSums, comm: Communicator, device: torch.device, size: int) -> bool:
    generator = torch.Generator(device).manual_seed(3 + comm.rank)
    both = torch.randint(-8, 9, (HALVES, size), generator=generator, device=device).to(torch.bfloat16)
    expected = comm.all_reduce(both.clone())
    parts = [halves.part(half, (size,), torch.bfloat16) for half in range(HALVES)]
    for half, part in enumerate(parts):
        part.copy_(both[half])
        halves.start(half, part)
    for half in range(HALVES):
        halves.wait(half)
    return all(torch.equal(part, right) for part, right in zip(parts, expected, strict=True))


def _unanimous(mine: bool, comm: Communicator, device: torch.device) -> bool:
    votes = comm.all_reduce(torch.tensor([float(mine)], device=device))
    return int(votes.item()) == comm.world_size


def _view(storage: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return storage[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
