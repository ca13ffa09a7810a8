"""The Triton kernels for rows against their torch reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from treadle.engine.cuda.row_ops import TorchRowOps

from .tritonkit import DEVICE

from treadle.engine.kernels.rows import TritonRowOps  # isort: skip

ROWS, WIDTH, PAGES, BLOCK = 9, 40, 12, 4


@pytest.fixture(autouse=True, scope="module")
def on_the_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def int32(*shape: int, most: int = 1000) -> torch.Tensor:
    return torch.randint(0, most, shape, dtype=torch.int32)


def both() -> tuple[TorchRowOps, TritonRowOps]:
    return TorchRowOps(), TritonRowOps()


@pytest.mark.parametrize("lengths", [[1], [5, 0, 1030, 64], [1024] * 3])
def test_spans_land_where_they_should(lengths: list[int]) -> None:
    data = int32(sum(lengths) + 3)
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    spans = torch.tensor([[7 + 1100 * index for index in range(len(lengths))], starts, lengths])
    arenas = []
    for ops in both():
        arena = torch.full((5000,), -1, dtype=torch.int32)
        ops.write_spans(arena, spans, data, max(lengths))
        arenas.append(arena)
    assert torch.equal(*arenas)
    assert int((arenas[0] != -1).sum()) == sum(lengths)


@pytest.mark.parametrize("count", [1, 3, 128, 130])
def test_a_decode_step_is_prepared(count: int) -> None:
    history, rows, positions = int32(ROWS, WIDTH), int32(count, most=ROWS), int32(count, most=WIDTH).long()
    first = int32(ROWS, PAGES)
    address, value = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    address[: min(count, 3)] = torch.tensor([14, 5, 100], dtype=torch.int32)[:count]
    value[: min(count, 3)] = torch.tensor([71, 72, 73], dtype=torch.int32)[:count]
    found = []
    for ops in both():
        table, token_ids = first.clone(), torch.full((count,), -1)
        ops.prepare(history, table, rows, positions, address, value, token_ids)
        found.append((table, token_ids))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], history[rows.long(), positions].long())


@pytest.mark.parametrize("counts", [[1], [1, 1, 7], [20, 3, 1, 40], [300]])
def test_rows_with_several_tokens_are_expanded(counts: list[int]) -> None:
    width = 320
    history, table = int32(ROWS, width), int32(ROWS, width // BLOCK)
    rows = torch.randperm(ROWS)[: len(counts)].int()
    starts = torch.tensor([min(5 * index, width - count) for index, count in enumerate(counts)], dtype=torch.int32)
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    reference, kernels = (
        ops.expand(history, table, rows, starts, ends, BLOCK, sum(counts), max(counts)) for ops in both()
    )
    for expected, found in zip(reference, kernels, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("count", [1, 5, 200])
def test_sampled_tokens_come_back(count: int) -> None:
    targets = torch.randperm(ROWS * WIDTH)[:count]
    tokens, peaks = torch.randint(0, 1 << 20, (count,)), torch.randn(count, dtype=torch.float64)
    peaks[0] = float("nan")
    found = []
    for ops in both():
        history, out = torch.zeros((ROWS, WIDTH), dtype=torch.int32), torch.zeros(2 * count, dtype=torch.float64)
        ops.finish(history, targets, tokens, peaks, out)
        found.append((history, out))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].nan_to_num(-9), found[1][1].nan_to_num(-9))
    assert found[1][1][:count].long().tolist() == tokens.tolist()
