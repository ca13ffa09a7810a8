"""Attention of several queries per row over paged keys and values (FlashAttention-2, Dao 2023): bound by arithmetic.

The rows of a tile are pairs of a query and one of the query heads that share a KV head, so that every key that is read
serves them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pages import page_of, page_place, widen
from .shapes import LOG2_E, ceil_div, dot_precision, power_of_two


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """How the kernel is compiled: (query, head) pairs and keys per tile, warps, depth of the software pipeline."""

    pairs: int
    keys: int
    warps: int
    stages: int


def prefill_config(dim: int, dtype: torch.dtype, pairs: int) -> PrefillConfig:
    """The static choice for heads of `dim` elements; `pairs`: queries times group of the longest row."""
    if dtype is torch.float32:
        return PrefillConfig(32, 32, 4, 2)
    if dim > 128:  # what fits into shared memory
        return PrefillConfig(64, 32, 4, 2)
    if pairs <= 64:
        return PrefillConfig(64, 64, 4, 3)
    return PrefillConfig(128, 128, 8, 3)


@triton.jit
def _look(
    mixed,
    total,
    top,
    query,
    position,
    k_head,
    v_head,
    pages,
    begin,
    end,
    window,
    k_stride,
    v_stride,
    scale_log2,
    column,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys [begin, end), `begin` a multiple of KEYS. Not MASKED: every query sees all of them, and KEYS divides end."""
    key = tl.arange(0, KEYS)
    page = page_of(pages, begin, end, key, BLOCK_SIZE, KEYS)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        spot = start + key
        place = page_place(start, key, BLOCK_SIZE, KEYS)[:, None] * DIM
        k_place = k_head + (widen(page) * k_stride + place)
        v_place = v_head + (widen(page) * v_stride + place)
        page = page_of(pages, start + KEYS, end, key, BLOCK_SIZE, KEYS)
        if MASKED:
            # What was never written may be anything, and zero times that is not always zero: it is not read.
            seen = (spot < end)[:, None] & (column < DIM)
            k = tl.load(k_place, mask=seen, other=0.0).to(query.dtype)
        elif DIM != DIM_PAD:
            k = tl.load(k_place, mask=column < DIM, other=0.0).to(query.dtype)
        else:
            k = tl.load(k_place).to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            visible = (spot[None, :] <= position[:, None]) & (spot < end)[None, :]
            if WINDOWED:
                visible = visible & (spot[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        base = new_top
        if WINDOWED:  # a tile may lie before a query's window as a whole
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale_log2 - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None]
        if MASKED:
            v = tl.load(v_place, mask=seen, other=0.0).to(query.dtype)
        elif DIM != DIM_PAD:
            v = tl.load(v_place, mask=column < DIM, other=0.0).to(query.dtype)
        else:
            v = tl.load(v_place).to(query.dtype)
        mixed = tl.dot(weights.to(query.dtype), v, mixed, input_precision=PRECISION)
        top = new_top
    return mixed, total, top


@triton.jit(do_not_specialize_on_alignment=["rows", "query_starts", "context_lens"])
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    table,
    rows,
    query_starts,
    context_lens,
    out,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    out_stride,
    scale_log2,
    window,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (i, h, r): a tile of queries of row r, last tiles first as they have most keys, for KV head h."""
    queries: tl.constexpr = PAIRS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    r = tl.program_id(2)
    flat = tl.load(query_starts + r)
    count = tl.load(query_starts + r + 1) - flat
    first = tile * queries
    if first >= count:
        return
    context = tl.load(context_lens + r)
    prefix = context - count
    pages = table + tl.load(rows + r).to(tl.int64) * table_stride

    pair = tl.arange(0, PAIRS)
    index = first + pair // GROUP
    column = tl.arange(0, DIM_PAD)[None, :]
    live = ((pair < queries * GROUP) & (index < count))[:, None] & (column < DIM)
    token = (flat + index).to(tl.int64)[:, None]
    head = (kv_head * GROUP + pair % GROUP)[:, None]
    query = tl.load(q + token * q_stride + head * DIM + column, mask=live, other=0.0)
    position = prefix + index
    k_head = k_cache + kv_head * (BLOCK_SIZE * DIM) + column
    v_head = v_cache + kv_head * (BLOCK_SIZE * DIM) + column

    top = tl.full((PAIRS,), float("-inf"), tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    mixed = tl.zeros((PAIRS, DIM_PAD), tl.float32)
    end = prefix + tl.minimum(count, first + queries)
    if WINDOWED:
        begin = tl.maximum(prefix + first - window + 1, 0) // KEYS * KEYS
    else:
        begin = tl.maximum(prefix + first + 1, 0) // KEYS * KEYS
        mixed, total, top = _look(
            mixed, total, top, query, position, k_head, v_head, pages, 0, begin, window, k_stride, v_stride,
            scale_log2, column, DIM, DIM_PAD, BLOCK_SIZE, KEYS, STAGES, False, False, PRECISION,
        )  # fmt: skip
    mixed, total, top = _look(
        mixed, total, top, query, position, k_head, v_head, pages, begin, end, window, k_stride, v_stride,
        scale_log2, column, DIM, DIM_PAD, BLOCK_SIZE, KEYS, STAGES, True, WINDOWED, PRECISION,
    )  # fmt: skip
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + token * out_stride + head * DIM + column, result.to(out.dtype.element_ty), mask=live)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    rows: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    max_query_len: int,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    config: PrefillConfig | None = None,
) -> None:
    """Causal attention of q [T, q_heads, head_dim] to out [T, q_heads * head_dim].

    The queries [query_starts[i], query_starts[i + 1]) of q are the last ones of a context of context_lens[i] tokens,
    whose keys and values are all in the caches. query_starts: int32 [R + 1]; max_query_len: the longest of the R rows,
    or more. rows: int32 [R]; everything else is as in `paged_decode`.
    """
    (_, q_heads, dim), (_, kv_heads, block_size, _) = q.shape, k_cache.shape
    count = rows.shape[0]
    if count == 0 or max_query_len == 0:
        return
    group = q_heads // kv_heads
    config = config or prefill_config(dim, q.dtype, max_query_len * group)
    pairs = max(config.pairs, power_of_two(group))
    _prefill_kernel[(ceil_div(max_query_len, pairs // group), kv_heads, count)](
        q,
        k_cache,
        v_cache,
        table,
        rows,
        query_starts,
        context_lens,
        out,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        table.stride(0),
        out.stride(0),
        scale * LOG2_E,
        window or 0,
        GROUP=group,
        PAIRS=pairs,
        DIM=dim,
        DIM_PAD=max(16, power_of_two(dim)),
        BLOCK_SIZE=block_size,
        KEYS=config.keys,
        STAGES=config.stages,
        WINDOWED=window is not None,
        PRECISION=dot_precision(q.dtype),
        num_warps=config.warps,
        num_stages=config.stages,
    )
