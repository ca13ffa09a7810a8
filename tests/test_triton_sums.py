"""Sums over ranks with residual and norm in one launch: the ranks one after the other, over ordinary memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from . import tritonkit
from .tritonkit import DEVICE

from treadle.engine.comm_fused import SLOTS, SymmetricSums  # isort: skip
from treadle.engine.comm import SingleComm  # isort: skip
from treadle.engine.kernels.elementwise import TritonOps  # isort: skip
from treadle.engine.kernels.sums import MOST_PROGRAMS  # isort: skip
from treadle.engine.layers import RowParallelLinear  # isort: skip
from treadle.engine.linear import Placement, make_linear  # isort: skip
from treadle.engine.norm import Norm  # isort: skip
from treadle.engine.ops import TorchOps  # isort: skip

assert tritonkit  # the kernels above were declared after it

LIMIT = 1 << 17
EPS = 1e-5


class World:
    """Memory of all ranks in one process. Each rank is told at once that its peers are there, as they will be."""

    def __init__(self, size: int) -> None:
        self.memories = [
            torch.zeros(SymmetricSums.needed(LIMIT), dtype=torch.uint8, device=DEVICE) for _ in range(size)
        ]
        for memory in self.memories:
            memory[: SLOTS * LIMIT] = 0xFF  # NaN in every dtype
        addresses = [memory.data_ptr() for memory in self.memories]
        self.ranks = [SymmetricSums(memory, addresses, rank, LIMIT) for rank, memory in enumerate(self.memories)]

    @property
    def flags(self) -> list[Tensor]:
        """int32 [MOST_PROGRAMS, ranks] of each rank."""
        size = len(self.ranks)
        flat = [memory[SLOTS * LIMIT :].view(torch.int32) for memory in self.memories]
        return [flags[: MOST_PROGRAMS * size].view(MOST_PROGRAMS, size) for flags in flat]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("world_size", "rows", "width"), [(2, 1, 96), (2, 5, 128), (3, 2, 520), (4, 3, 64)])
def test_what_a_sum_and_a_norm_give(world_size: int, rows: int, width: int, dtype: torch.dtype) -> None:
    world = World(world_size)
    parts = [torch.randn(rows, width, device=DEVICE).to(dtype) for _ in range(world_size)]
    residual, weight = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((rows, width), (width,)))
    exact = residual.double() + sum(part.double() for part in parts)
    rounded = exact.to(dtype)
    expected = TorchOps().rms_norm(rounded, weight, EPS)
    slots = [sums.slot(1, (rows, width), dtype) for sums in world.ranks]
    for slot, part in zip(slots, parts, strict=True):
        assert slot is not None
        slot.copy_(part)
    for flags in world.flags:
        flags += 1
    found, streams = [], []
    for sums, slot in zip(world.ranks, slots, strict=True):
        assert slot is not None
        streams.append(residual.clone())
        found.append(sums.add_norm(slot, streams[-1], weight, EPS))
    unit = torch.finfo(dtype).eps
    for stream, normed in zip(streams, found, strict=True):
        assert torch.equal(stream, streams[0]) and torch.equal(normed, found[0])  # the same bits on every rank
    torch.testing.assert_close(streams[0].double(), exact, rtol=unit, atol=8e-7)
    torch.testing.assert_close(found[0], expected, rtol=8 * unit, atol=8 * unit)
    for rank, flags in enumerate(world.flags):  # taken off once and put up once by each peer, who was here
        others = [peer for peer in range(world_size) if peer != rank]
        assert bool((flags[:rows, others] == 1).all()) and bool((flags[rows:] == 1).all())


def test_more_rows_than_programs() -> None:
    world = World(2)
    rows, width = MOST_PROGRAMS + 2, 16
    for sums, memory in zip(world.ranks, world.memories, strict=True):
        slot = sums.slot(0, (rows, width), torch.float32)
        assert slot is not None and slot.data_ptr() == memory.data_ptr()
        slot.copy_(torch.arange(rows, device=DEVICE)[:, None].expand(rows, width))
    world.flags[0].fill_(1)
    residual = torch.zeros(rows, width, device=DEVICE)
    part = world.ranks[0].slot(0, (rows, width), torch.float32)
    assert part is not None
    world.ranks[0].add_norm(part, residual, torch.ones(width, device=DEVICE), EPS)
    assert torch.equal(residual[:, 3], 2.0 * torch.arange(rows, device=DEVICE))


def test_slots_take_turns_and_large_sums_are_refused() -> None:
    sums = World(2).ranks[0]
    slots = [sums.slot(turn, (4, 64), torch.bfloat16) for turn in range(3)]
    assert slots[0] is not None and slots[1] is not None and slots[2] is not None
    assert slots[1].data_ptr() - slots[0].data_ptr() == LIMIT and slots[2].data_ptr() == slots[0].data_ptr()
    for shape, dtype in (((0, 64), torch.float32), ((4, 3), torch.bfloat16), ((LIMIT, 8), torch.float32)):
        assert sums.slot(0, shape, dtype) is None
    assert sums.slot(0, (4, 64), torch.int64) is None


class Pair(SingleComm):
    """A rank of two, with fused sums."""

    world_size = 2

    def __init__(self, rank: int, fused: SymmetricSums) -> None:
        self.rank = rank  # type: ignore[misc]
        self.fused = fused


def test_a_row_parallel_layer_uses_them() -> None:
    world = World(2)
    placement = Placement(DEVICE, torch.float32, pack=False)
    weights, inputs = ([torch.randn(*shape, device=DEVICE) for _ in range(2)] for shape in ((16, 8), (3, 8)))
    residual, norm = torch.randn(3, 16, device=DEVICE), Norm(torch.rand(16, device=DEVICE), EPS, TritonOps())
    exact = residual + sum(x @ weight.T for x, weight in zip(inputs, weights, strict=True))
    peer = world.ranks[1].slot(1, (3, 16), torch.float32)
    assert peer is not None
    peer.copy_(inputs[1] @ weights[1].T)
    world.flags[0].fill_(1)
    layer = RowParallelLinear(make_linear(weights[0], None, placement), Pair(0, world.ranks[0]), turn=1)
    found = layer.add_norm(inputs[0], residual, norm)
    torch.testing.assert_close(residual, exact)
    torch.testing.assert_close(found, norm(exact))
