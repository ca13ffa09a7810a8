"""The Triton attention kernels against the definition in float64, over scattered, poisoned pages.

Interpreted where there is no GPU, so shapes are small; test_gpu_kernels.py has those of real models.
"""

from __future__ import annotations

import math

import pytest
import torch

from . import tritonkit
from .attentionkit import TOLERANCE, PagedRows, relative_error
from .tritonkit import DEVICE

from treadle.engine.batch import ForwardBatch  # isort: skip
from treadle.engine.kernels.decode import (  # isort: skip
    DecodeConfig,
    choose_splits,
    decode_workspace,
    paged_decode,
)
from treadle.engine.kernels.paged_attention import TritonAttention  # isort: skip
from treadle.engine.kernels.prefill import PrefillConfig, paged_prefill  # isort: skip

assert tritonkit  # the kernels above were declared after it

SCALE = 0.2
DECODE = [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (131, 1)]
PREFILL = [(2, 2), (16, 16), (70, 70), (70, 5), (33, 32), (150, 140)]


def check_decode(rows: PagedRows, window: int | None, splits: int, config: DecodeConfig | None = None) -> None:
    count, heads, dim = rows.queries.shape
    workspace = decode_workspace(count, heads, dim, max(splits, 2), DEVICE)
    workspace.partial.fill_(math.nan)
    workspace.logsum.fill_(math.nan)
    expected = rows.expected(SCALE, window)
    for _ in range(2):  # the second finds the workspace as the first left it
        out = rows.poisoned_out()
        paged_decode(
            rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.context_lens, out,
            scale=SCALE, window=window, num_splits=splits, workspace=workspace, config=config,
        )  # fmt: skip
        assert relative_error(out, expected) < TOLERANCE[out.dtype]
        assert not workspace.arrived.any()


def check_prefill(rows: PagedRows, window: int | None, config: PrefillConfig | None = None) -> None:
    out = rows.poisoned_out()
    paged_prefill(
        rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.query_starts, rows.context_lens,
        rows.max_query_len, out, scale=SCALE, window=window, config=config,
    )  # fmt: skip
    assert relative_error(out, rows.expected(SCALE, window)) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 24])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode(dtype: torch.dtype, window: int | None, splits: int) -> None:
    check_decode(PagedRows([*DECODE, (420, 1)], (6, 2, 64), 16, dtype, DEVICE), window, splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 24])
def test_prefill(dtype: torch.dtype, window: int | None) -> None:
    check_prefill(PagedRows(PREFILL, (6, 2, 64), 16, dtype, DEVICE), window)


@pytest.mark.parametrize("block_size", [8, 32, 64, 256])
def test_page_sizes(block_size: int) -> None:
    lengths = [(block_size - 1, 1), (block_size, 1), (block_size + 1, 1), (300, 1)]
    check_decode(PagedRows(lengths, (4, 1, 64), block_size, torch.float32, DEVICE), None, 2)
    lengths = [(block_size, block_size), (block_size + 1, 2), (150, 9)]
    check_prefill(PagedRows(lengths, (2, 1, 64), block_size, torch.float32, DEVICE), None)


@pytest.mark.parametrize("heads", [(1, 1, 64), (3, 3, 8), (7, 1, 24), (8, 2, 128), (10, 2, 40), (20, 1, 96)], ids=str)
def test_shapes_of_heads(heads: tuple[int, int, int]) -> None:
    check_decode(PagedRows([(1, 1), (200, 1)], heads, 16, torch.float32, DEVICE), None, 2)
    check_prefill(PagedRows([(37, 37), (50, 8)], heads, 16, torch.float32, DEVICE), None)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("splits", [1, 8, 40])
def test_combining_many_parts(splits: int, fused: bool) -> None:
    """More parts than are combined at a time, rows that have fewer, and one that has no keys at all."""
    rows = PagedRows([(1300, 1), (129, 1), (0, 1)], (3, 1, 16), 16, torch.float32, DEVICE)
    check_decode(rows, None, splits, DecodeConfig(32, 4, 2, fused))


def test_rows_without_context_give_zeros() -> None:
    rows = PagedRows([(0, 1), (5, 1), (0, 1)], (4, 2, 64), 16, torch.bfloat16, DEVICE)
    check_decode(rows, None, 1)
    check_decode(rows, 8, 2)
    out = rows.poisoned_out()
    paged_prefill(
        rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.query_starts, rows.context_lens, 1, out,
        scale=SCALE, window=None,
    )  # fmt: skip
    assert not out[0].any() and not out[2].any() and out[1].isfinite().all()


def test_large_scores_do_not_overflow() -> None:
    rows = PagedRows([(70, 1), (3, 1)], (4, 2, 64), 16, torch.float32, DEVICE)
    rows.queries.fill_(1e4)
    check_decode(rows, None, 2)
    rows = PagedRows([(70, 40)], (4, 2, 64), 16, torch.float32, DEVICE)
    rows.queries.fill_(1e4)
    check_prefill(rows, None)


def test_other_tiles_give_the_same() -> None:
    rows = PagedRows([(300, 1), (33, 1)], (4, 1, 64), 16, torch.bfloat16, DEVICE)
    for numbers in ((16, 2, 2), (32, 4, 4), (128, 8, 2), (64, 4, 3, False)):
        check_decode(rows, None, 2, DecodeConfig(*numbers))
    rows = PagedRows([(90, 70), (20, 20)], (4, 1, 64), 16, torch.bfloat16, DEVICE)
    for tile in (PrefillConfig(16, 16, 2, 2), PrefillConfig(64, 32, 4, 3), PrefillConfig(128, 64, 8, 2)):
        check_prefill(rows, None, tile)


def test_splitting_without_room_is_refused() -> None:
    rows = PagedRows([(200, 1)] * 4, (4, 1, 64), 16, torch.float32, DEVICE)
    small = decode_workspace(2, 4, 64, 2, DEVICE)
    for workspace in (None, small):
        with pytest.raises(ValueError, match="workspace"):
            paged_decode(
                rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.context_lens,
                rows.poisoned_out(), scale=SCALE, window=None, num_splits=4, workspace=workspace,
            )  # fmt: skip


@pytest.mark.parametrize("max_context", [1, 128, 4096, 131072])
@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_splits_fill_the_gpu_and_fit_the_workspace(max_context: int, kv_heads: int) -> None:
    workspace = decode_workspace(1024, kv_heads * 4, 8, 64, torch.device("cpu"))
    for rows in (1, 2, 7, 32, 100, 256, 1000, 1024, 5000):
        splits = choose_splits(rows, kv_heads, max_context, 132)
        assert splits == 1 or (workspace.holds(rows, kv_heads * 4, splits) and rows <= 1024)
        assert splits == 1 or rows * kv_heads * splits <= max(132 * 4, 2 * rows * kv_heads)


def batch_of(rows: PagedRows, on_device: bool) -> ForwardBatch:
    """As the engine makes it: tables on the device and indexed by row, or one table per row of the batch."""
    nothing = torch.zeros(rows.starts[-1], dtype=torch.int64, device=DEVICE)
    return ForwardBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        query_starts=rows.starts,
        context_lens=rows.context_lens,
        max_context=rows.max_context,
        block_tables=None if on_device else rows.table[rows.rows.long()],
        num_decode=sum(queries == 1 for _, queries in rows.lengths),
        sample_index=nothing[:0],
        rows=rows.rows if on_device else None,
        table=rows.table if on_device else None,
        query_starts_device=rows.query_starts if on_device else None,
        max_query_len=rows.max_query_len if on_device else 1,
    )


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("lengths", [DECODE, PREFILL, DECODE + PREFILL], ids=["decode", "prefill", "mixed"])
def test_backend(lengths: list[tuple[int, int]], on_device: bool) -> None:
    rows = PagedRows(lengths, (6, 2, 64), 16, torch.bfloat16, DEVICE)
    backend = TritonAttention(SCALE, 100)
    plan = backend.plan(batch_of(rows, on_device), 16, torch.bfloat16)
    out = backend.attend(rows.queries, rows.k_cache, rows.v_cache, plan)
    assert relative_error(out, rows.expected(SCALE, 100)) < TOLERANCE[torch.bfloat16]


def test_cache_of_another_precision() -> None:
    rows = PagedRows([(40, 1), (20, 20)], (4, 2, 64), 16, torch.bfloat16, DEVICE)
    rows.queries = rows.queries.float()
    backend = TritonAttention(SCALE, None)
    plan = backend.plan(batch_of(rows, True), 16, torch.float32)
    out = backend.attend(rows.queries, rows.k_cache, rows.v_cache, plan)
    assert relative_error(out, rows.expected(SCALE, None)) < TOLERANCE[torch.float32]
