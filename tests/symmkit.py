"""Symmetric memory for tests: threads for ranks, and ordinary memory that all of them see."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from treadle.engine.comm import SingleComm
from treadle.engine.comm_symm import SymmetricComm

LIMIT, LARGE = 1024, 4096


class World:
    """Memory of `size` ranks, and a barrier for each step of a collective.

    side: bytes of each of two halves. large: of the largest sum that goes through it.
    """

    def __init__(self, size: int, side: int = 0, large: int = LARGE) -> None:
        self.size = size
        self._side, self._large = side, large
        self.buffers = [torch.full((max(large, 2 * side) + 256,), 255, dtype=torch.uint8) for _ in range(size)]
        self.slow: list[list[Tensor | None]] = [[] for _ in range(size)]
        self.shots: list[int] = []
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, task: Callable[[SymmetricComm], Tensor]) -> list[Tensor]:
        outcomes: dict[int, Tensor] = {}

        def rank(number: int) -> None:
            comm = SymmetricComm(SlowComm(self, number), PretendedOneShot(self, number), LIMIT, self._large, self._side)
            outcomes[number] = task(comm)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [outcomes[number] for number in range(self.size)]


class PretendedOneShot:
    def __init__(self, world: World, rank: int) -> None:
        self._world, self._rank = world, rank
        self.buffer = world.buffers[rank]

    def reduce(self, staged: Tensor, out: Tensor) -> None:
        first, size = staged.storage_offset() * staged.itemsize, staged.nbytes
        self._world.barrier.wait()
        parts = [buffer[first : first + size].view(staged.dtype).view(staged.shape) for buffer in self._world.buffers]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        self._world.barrier.wait()
        out.copy_(total)

    def reduce_in_place(self, staged: Tensor) -> None:
        """This rank's share, for everyone."""
        size, rank, world = staged.numel(), self._rank, self._world.size
        share = -(-size // world)
        first = staged.storage_offset() * staged.itemsize
        parts = [buffer[first : first + staged.nbytes].view(staged.dtype) for buffer in self._world.buffers]
        self._world.barrier.wait()
        mine = slice(share * rank, min(share * (rank + 1), size))
        total = parts[0][mine].clone()
        for part in parts[1:]:
            total += part[mine]
        for part in parts:
            part[mine] = total
        self._world.shots.append(size)
        self._world.barrier.wait()


class SlowComm(SingleComm):
    """Records that it was asked, and returns what it was given."""

    def __init__(self, world: World, rank: int) -> None:
        self.rank = rank  # type: ignore[misc]
        self.world_size = world.size  # type: ignore[misc]
        self._asked = world.slow[rank]

    def all_reduce(self, x: Tensor) -> Tensor:
        self._asked.append(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        self._asked.append(x)
        return x.expand(self.world_size, *x.shape)
