"""One-shot collectives, with threads for ranks and ordinary memory for symmetric memory."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from treadle.engine.comm import SingleComm
from treadle.engine.comm_symm import SymmetricComm, accelerate
from treadle.engine.layers import RowParallelLinear
from treadle.engine.linear import Placement, make_linear

LIMIT = 1024


class World:
    """Memory of `size` ranks, and a barrier for each step of a collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffers = [torch.full((LIMIT + 256,), 255, dtype=torch.uint8) for _ in range(size)]
        self.slow: list[list[Tensor | None]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=20)

    def run(self, task: Callable[[SymmetricComm], Tensor]) -> list[Tensor]:
        outcomes: dict[int, Tensor] = {}

        def rank(number: int) -> None:
            comm = SymmetricComm(SlowComm(self, number), PretendedOneShot(self, number), LIMIT)
            outcomes[number] = task(comm)

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [outcomes[number] for number in range(self.size)]


class PretendedOneShot:
    def __init__(self, world: World, rank: int) -> None:
        self._world = world
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


def value(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_sum_goes_through_symmetric_memory(world_size: int, dtype: torch.dtype) -> None:
    world = World(world_size)
    inputs = [value(rank, 8, 16).to(dtype) for rank in range(world_size)]
    sums = world.run(lambda comm: comm.all_reduce(inputs[comm.rank].clone()))
    expected = inputs[0].clone()
    for part in inputs[1:]:
        expected += part
    assert all(torch.equal(one, expected) for one in sums)
    assert not any(world.slow)


def test_what_was_computed_in_place_is_not_copied_and_not_overwritten() -> None:
    world = World(2)

    def task(comm: SymmetricComm) -> Tensor:
        staged = comm.staging((4, 8), torch.float32)
        assert staged is not None
        staged.copy_(value(comm.rank, 4, 8))
        first = comm.all_reduce(staged)
        assert first.data_ptr() != staged.data_ptr()
        comm.all_reduce(torch.ones(4, 8))
        return first

    for outcome in world.run(task):
        assert torch.equal(outcome, value(0, 4, 8) + value(1, 4, 8))


def test_small_gathers_are_sums_with_zeros_and_keep_infinity() -> None:
    world = World(3)
    parts = [value(rank, 2, 4) for rank in range(3)]
    parts[1][0, 0] = -torch.inf
    for outcome in world.run(lambda comm: comm.all_gather(parts[comm.rank])):
        assert torch.equal(outcome, torch.stack(parts))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((LIMIT,), torch.float32), ((3,), torch.float32), ((8,), torch.float16), ((0, 8), torch.float32)],
    ids=["too large", "not a multiple of 16 bytes", "another dtype", "empty"],
)
def test_everything_else_is_left_to_the_base(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    world = World(2)
    world.run(lambda comm: comm.all_reduce(torch.zeros(shape, dtype=dtype)))
    world.run(lambda comm: comm.all_gather(torch.zeros(shape, dtype=torch.int64)))
    assert [len(asked) for asked in world.slow] == [2, 2]


def test_a_row_parallel_product_is_computed_in_place() -> None:
    world = World(2)
    placement = Placement(torch.device("cpu"), torch.float32, pack=False)
    weights, inputs = [value(10 + rank, 8, 5) for rank in range(2)], [value(rank, 3, 5) for rank in range(2)]

    def task(comm: SymmetricComm) -> Tensor:
        return RowParallelLinear(make_linear(weights[comm.rank], None, placement), comm)(inputs[comm.rank])

    expected = inputs[0] @ weights[0].T + inputs[1] @ weights[1].T
    for outcome in world.run(task):
        torch.testing.assert_close(outcome, expected)
    assert not any(world.slow)


def test_without_several_gpus_nothing_changes() -> None:
    comm = SingleComm()
    assert accelerate(comm, torch.device("cuda", 0)) is comm
    assert accelerate(comm, torch.device("cpu")) is comm
