"""Collectives of one shot and of two, with threads for ranks and ordinary memory for symmetric memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.symmkit import LARGE, World
from treadle.engine.comm import SingleComm
from treadle.engine.comm_symm import SymmetricComm, accelerate
from treadle.engine.layers import RowParallelLinear
from treadle.engine.linear import Placement, make_linear
from treadle.engine.norm import Norm, normed
from treadle.engine.ops import TorchOps


class InPlace(TorchOps):
    """Norms of sums in the memory of what was added, as Triton's."""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x.copy_(super().add_rms_norm(x, residual, weight, eps))


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


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_large_sum_takes_two_shots_and_is_the_callers(world_size: int) -> None:
    world = World(world_size)
    shape = (LARGE // 64, 16)
    expected = sum(value(rank, *shape).double() for rank in range(world_size))

    def task(comm: SymmetricComm) -> Tensor:
        first = comm.all_reduce(value(comm.rank, *shape))
        staged = comm.staging(shape, torch.float32)
        assert staged is not None
        staged.copy_(value(comm.rank, *shape))
        second = comm.all_reduce(staged)
        assert second.data_ptr() != staged.data_ptr()
        comm.all_reduce(torch.ones(shape))  # overwrites what lies in staging
        return torch.stack([first, second])

    for outcome in world.run(task):
        torch.testing.assert_close(outcome.double(), torch.stack([expected, expected]))  # type: ignore[list-item]
    assert len(world.shots) == 3 * world_size and not any(world.slow)


def test_a_large_sum_may_stay_where_it_was_computed() -> None:
    world = World(2)

    def task(comm: SymmetricComm) -> Tensor:
        staged = comm.staging((LARGE // 64, 16), torch.float32)
        small = comm.staging((4, 8), torch.float32)
        assert staged is not None and small is not None
        staged.copy_(value(comm.rank, *staged.shape))
        found = comm.reduce_staged(staged)
        assert found.data_ptr() == staged.data_ptr()
        kept = comm.owned(found)
        assert comm.owned(found[3:]).data_ptr() != found[3:].data_ptr() and comm.owned(kept) is kept
        small.fill_(1)
        assert comm.reduce_staged(small).data_ptr() != small.data_ptr()
        return kept

    for outcome in world.run(task):
        assert torch.equal(outcome, value(0, *outcome.shape) + value(1, *outcome.shape))


def test_small_gathers_are_sums_with_zeros_and_keep_infinity() -> None:
    world = World(3)
    parts = [value(rank, 2, 4) for rank in range(3)]
    parts[1][0, 0] = -torch.inf
    for outcome in world.run(lambda comm: comm.all_gather(parts[comm.rank])):
        assert torch.equal(outcome, torch.stack(parts))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((LARGE,), torch.float32), ((3,), torch.float32), ((8,), torch.float16), ((0, 8), torch.float32)],
    ids=["too large", "not a multiple of 16 bytes", "another dtype", "empty"],
)
def test_everything_else_is_left_to_the_base(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    world = World(2)
    world.run(lambda comm: comm.all_reduce(torch.zeros(shape, dtype=dtype)))
    world.run(lambda comm: comm.all_gather(torch.zeros(shape, dtype=torch.int64)))
    assert [len(asked) for asked in world.slow] == [2, 2]


@pytest.mark.parametrize("rows", [3, 70])
def test_a_row_parallel_product_is_computed_in_place(rows: int) -> None:
    world = World(2)
    placement = Placement(torch.device("cpu"), torch.float32, pack=False)
    weights, inputs = [value(10 + rank, 8, 5) for rank in range(2)], [value(rank, rows, 5) for rank in range(2)]

    def task(comm: SymmetricComm) -> Tensor:
        return RowParallelLinear(make_linear(weights[comm.rank], None, placement), comm)(inputs[comm.rank])

    expected = inputs[0] @ weights[0].T + inputs[1] @ weights[1].T
    for outcome in world.run(task):
        torch.testing.assert_close(outcome, expected)
    assert not any(world.slow) and len(world.shots) == (2 if rows > 3 else 0)


def test_two_sums_of_many_rows_with_their_norms() -> None:
    """The norm lies where the sum did; it has been read when the next product is written there."""
    world = World(2)
    placement = Placement(torch.device("cpu"), torch.float32, pack=False)
    weights = [[value(10 * turn + rank, 8, 8) for rank in range(2)] for turn in (1, 2)]
    norm = Norm(torch.rand(8), 1e-5, InPlace())
    start, x = value(7, 70, 8), value(8, 70, 8)

    def layers(comm: SymmetricComm) -> list[RowParallelLinear]:
        return [RowParallelLinear(make_linear(each[comm.rank], None, placement), comm) for each in weights]

    def task(comm: SymmetricComm) -> Tensor:
        residual, hidden = start.clone(), x
        for layer in layers(comm):
            read = normed(layer.add_norm(hidden, residual, norm))
            hidden = read * 2  # memory of its own, as a product's
        return torch.cat([residual, comm.owned(read)])

    residual, hidden = start.clone(), x
    for each in weights:
        residual = residual + hidden @ (each[0] + each[1]).T
        read = TorchOps().rms_norm(residual, norm.weight, norm.eps)
        hidden = read * 2
    for outcome in world.run(task):
        torch.testing.assert_close(outcome, torch.cat([residual, read]), rtol=1e-4, atol=1e-4)


def test_without_several_gpus_nothing_changes() -> None:
    comm = SingleComm()
    assert accelerate(comm, torch.device("cuda", 0)) is comm
    assert accelerate(comm, torch.device("cpu")) is comm
