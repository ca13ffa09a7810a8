"""Attention of one query per row over paged keys and values: bound by reading them, once.

A program takes one row, one KV head with all query heads that share it, and one part of the context. Parts ("splits")
fill the GPU when rows are few (Flash-Decoding, Dao et al. 2023). They are combined by the part of a row that finishes
last, or by a second launch; what is best for how many rows is measured and noted in `shapes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pages import page_of, page_place, widen
from .shapes import (
    DECODE_PROGRAMS,
    LOG2_E,
    DecodeConfig,
    ceil_div,
    decode_config,
    dot_precision,
    power_of_two,
    sm_count,
)

__all__ = ["DecodeConfig", "DecodeWorkspace", "choose_splits", "decode_config", "decode_workspace", "paged_decode"]

# A part has at least so many keys, or it would cost more than it saves: while it helps to fill the GPU, and after that,
# when a second part only keeps one long row from finishing long after the others.
_FEW_KEYS = 128
_MANY_KEYS = 2048
_MAX_SPLITS = 64
# rows * splits of a workspace: more rows than this are never split.
_WORKSPACE_PARTS = 2048
# Partial results that are read at a time.
_COMBINE = 8


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where the parts of split rows meet; owned by the backend, used by one launch at a time.

    partial: float32 [parts, head_dim], normalised. logsum: float32 [parts], base 2. arrived: int32 [rows * kv_heads],
    zero between launches. `parts` is in units of one query head of one split.
    """

    partial: Tensor
    logsum: Tensor
    arrived: Tensor

    def holds(self, rows: int, q_heads: int, splits: int) -> bool:
        return rows * q_heads * splits <= self.logsum.numel() and rows * q_heads <= self.arrived.numel()


def decode_workspace(max_rows: int, hq: int, d: int, max_splits: int, device: torch.device) -> DecodeWorkspace:
    """Enough for every rows <= max_rows with the splits that `choose_splits` allows, at most `max_splits`."""
    parts = max(min(max_rows * max_splits, _WORKSPACE_PARTS), max_splits) * hq
    return DecodeWorkspace(
        partial=torch.empty((parts, d), dtype=torch.float32, device=device),
        logsum=torch.empty(parts, dtype=torch.float32, device=device),
        arrived=torch.zeros(min(max_rows, _WORKSPACE_PARTS) * hq, dtype=torch.int32, device=device),
    )


def choose_splits(rows: int, kv_heads: int, max_context: int, num_sms: int, per_sm: int = DECODE_PROGRAMS) -> int:
    """Into how many parts contexts of up to `max_context` keys are cut.

    `max_context` may be the model's limit, as in a captured graph: a row is cut only as far as its own length allows,
    and the programs without a part of it leave at once.
    """
    programs = max(rows * kv_heads, 1)
    splits = min(per_sm * num_sms // programs, _MAX_SPLITS, ceil_div(max_context, _FEW_KEYS))
    if splits < 2 and max_context > _MANY_KEYS:
        splits = 2
    return max(min(splits, _WORKSPACE_PARTS // max(rows, 1)), 1)


def _least_keys(groups: int, num_sms: int, per_sm: int) -> int:
    """What a part has at least, of `groups` rows times KV heads."""
    return _FEW_KEYS if per_sm * num_sms // groups > 1 else _MANY_KEYS


@triton.jit
def _cut(context, window, splits, min_keys, KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """The first key that is looked at, how many keys a part has, and how many parts there are, at least one."""
    first = 0
    if WINDOWED:
        first = tl.maximum(context - window, 0) // KEYS * KEYS
    span = context - first
    wanted = tl.maximum(tl.minimum(tl.cdiv(span, min_keys), splits), 1)
    tiles = tl.maximum(tl.cdiv(tl.cdiv(span, wanted), KEYS), 1)
    return first, tiles * KEYS, tl.maximum(tl.cdiv(span, tiles * KEYS), 1)


@triton.jit(do_not_specialize_on_alignment=["rows", "context_lens"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    table,
    rows,
    context_lens,
    out,
    partial,
    logsum,
    arrived,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    out_stride,
    scale_log2,
    window,
    min_keys,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
    COMBINE: tl.constexpr,
    GROUP_POW2: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Program (h, r, s): KV head h of row r, part s of its context."""
    kv_head = tl.program_id(0)
    kv_heads = tl.num_programs(0)
    r = tl.program_id(1)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    context = tl.load(context_lens + r)
    first, part, parts = _cut(context, window, splits, min_keys, KEYS, WINDOWED)
    begin = first
    end = context
    if SPLIT:
        if split >= parts:
            return
        begin = first + split * part
        end = tl.minimum(begin + part, context)
    else:
        parts = 1

    pages = table + tl.load(rows + r).to(tl.int64) * table_stride
    member = tl.arange(0, GROUP_PAD)[:, None]
    column = tl.arange(0, DIM_PAD)[None, :]
    queries = (member < GROUP) & (column < DIM)
    q_head = r.to(tl.int64) * q_stride + (kv_head * GROUP + member) * DIM + column
    query = tl.load(q + q_head, mask=queries, other=0.0)
    k_head = k_cache + kv_head * (BLOCK_SIZE * DIM) + column
    v_head = v_cache + kv_head * (BLOCK_SIZE * DIM) + column

    key = tl.arange(0, KEYS)
    top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    mixed = tl.zeros((GROUP_PAD, DIM_PAD), tl.float32)
    page = page_of(pages, begin, end, key, BLOCK_SIZE, KEYS)
    for start in tl.range(begin, end, KEYS, num_stages=STAGES):
        position = start + key
        valid = position < end
        place = page_place(start, key, BLOCK_SIZE, KEYS)[:, None] * DIM
        k_place = k_head + (widen(page) * k_stride + place)
        v_place = v_head + (widen(page) * v_stride + place)
        page = page_of(pages, start + KEYS, end, key, BLOCK_SIZE, KEYS)
        # What was never written may be anything, and zero times that is not always zero: it is not read.
        seen = valid[:, None]
        if DIM != DIM_PAD:
            seen = seen & (column < DIM)
        k = tl.load(k_place, mask=seen, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION) * scale_log2
        if WINDOWED:
            valid = valid & (position >= context - window)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        # Every tile has a key that is seen, so the maximum is a number.
        new_top = tl.maximum(top, tl.max(scores, 1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * fade + tl.sum(weights, 1)
        mixed = mixed * fade[:, None]
        v = tl.load(v_place, mask=seen, other=0.0).to(query.dtype)
        mixed = tl.dot(weights.to(query.dtype), v, mixed, input_precision=PRECISION)
        top = new_top

    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    out_row = out + r.to(tl.int64) * out_stride + kv_head * (GROUP * DIM)
    if parts == 1:
        tl.store(out_row + member * DIM + column, result.to(out.dtype.element_ty), mask=queries)
    if SPLIT:  # noqa: SIM102 - known when compiling, unlike the next
        if parts > 1:
            group = r * kv_heads + kv_head
            slot = (group * splits + split) * GROUP
            tl.store(partial + (slot + member).to(tl.int64) * DIM + column, result, mask=queries)
            each = tl.arange(0, GROUP_PAD)
            tl.store(logsum + slot + each, top + tl.log2(total), mask=each < GROUP)
            if FUSED:
                # All threads have written before one announces it; the atomic orders that for the whole GPU.
                tl.debug_barrier()
                if tl.atomic_add(arrived + group, 1, sem="acq_rel", scope="gpu") == parts - 1:
                    tl.store(arrived + group, 0)
                    slot = group * splits * GROUP
                    _combine(partial, logsum, out_row, slot, parts, GROUP, GROUP, GROUP_POW2, DIM, DIM_PAD, COMBINE)


@triton.jit
def _combine(
    partial,
    logsum,
    out_row,
    slot,
    parts,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    HEADS_POW2: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """The mean of `parts` partial results of HEADS heads, weighted by their sums; read past the L1 cache.

    They lie from `slot` on, STRIDE apart. In the order of the parts, whoever finished first.
    """
    head = tl.arange(0, HEADS_POW2)
    column = tl.arange(0, DIM_PAD)[None, :]
    heads = head < HEADS
    inside = heads[:, None] & (column < DIM)
    logs = logsum + slot + head
    values = partial + (slot + head)[:, None].to(tl.int64) * DIM + column
    top = tl.full((HEADS_POW2,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_POW2,), tl.float32)
    mixed = tl.zeros((HEADS_POW2, DIM_PAD), tl.float32)
    for part in range(0, parts, COMBINE):
        for ahead in tl.static_range(COMBINE):
            there = part + ahead < parts
            log = tl.load(logs + ahead * STRIDE, mask=heads & there, other=float("-inf"), cache_modifier=".cg")
            if HEADS != HEADS_POW2:
                log = tl.where(heads, log, 0.0)
            place = values + ahead * (STRIDE * DIM)
            value = tl.load(place, mask=inside & there, other=0.0, cache_modifier=".cg")
            new_top = tl.maximum(top, log)
            fade = tl.exp2(top - new_top)
            weight = tl.exp2(log - new_top)
            total = total * fade + weight
            mixed = mixed * fade[:, None] + value * weight[:, None]
            top = new_top
        logs += COMBINE * STRIDE
        values += COMBINE * STRIDE * DIM
    result = mixed / total[:, None]
    tl.store(out_row + head[:, None] * DIM + column, result.to(out_row.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["context_lens"])
def _combine_kernel(
    context_lens,
    out,
    partial,
    logsum,
    out_stride,
    window,
    min_keys,
    splits,
    KEYS: tl.constexpr,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """Program (h, r): query head h of row r, if its context was split."""
    head = tl.program_id(0)
    r = tl.program_id(1)
    _, _, parts = _cut(tl.load(context_lens + r), window, splits, min_keys, KEYS, WINDOWED)
    if parts > 1:
        group = r * (tl.num_programs(0) // GROUP) + head // GROUP
        out_row = out + r.to(tl.int64) * out_stride + head * DIM
        slot = group * splits * GROUP + head % GROUP
        _combine(partial, logsum, out_row, slot, parts, 1, GROUP, 1, DIM, DIM_PAD, COMBINE)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    table: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None,
    num_splits: int,
    workspace: DecodeWorkspace | None = None,
    config: DecodeConfig | None = None,
) -> None:
    """Attention of q [R, q_heads, head_dim] to out [R, q_heads * head_dim].

    q: contiguous within a row. k_cache, v_cache: [blocks, kv_heads, block_size, head_dim], contiguous within a block.
    table: int32 [max_rows, P], the blocks of every row; rows: int32 [R] into it. context_lens: int32 [R], this step's
    token included; 0 gives zeros. window: how many keys a query sees, itself included; None is all. num_splits: see
    `choose_splits`; above 1 needs a workspace.
    """
    count, q_heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    if count == 0:
        return
    group = q_heads // kv_heads
    if num_splits > 1:
        if workspace is None or not workspace.holds(count, q_heads, num_splits):
            raise ValueError(f"no workspace for {count} rows in {num_splits} splits")
        scratch = (workspace.partial, workspace.logsum, workspace.arrived)
    else:
        scratch = (out, out, out)  # not touched
    sms = sm_count(q.device)
    config = config or decode_config(dim, q.dtype, count * kv_heads, sms)
    min_keys = max(_least_keys(count * kv_heads, sms, config.programs), config.keys)
    shape: dict[str, int | bool] = {
        "KEYS": config.keys,
        "WINDOWED": window is not None,
        "GROUP": group,
        "DIM": dim,
        "DIM_PAD": max(16, power_of_two(dim)),
        "COMBINE": _COMBINE,
    }
    _decode_kernel[(kv_heads, count, num_splits)](
        q,
        k_cache,
        v_cache,
        table,
        rows,
        context_lens,
        out,
        *scratch,
        q.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        table.stride(0),
        out.stride(0),
        scale * LOG2_E,
        window or 0,
        min_keys,
        SPLIT=num_splits > 1,
        GROUP_PAD=max(16, power_of_two(group)),
        BLOCK_SIZE=block_size,
        STAGES=config.stages,
        PRECISION=dot_precision(q.dtype),
        GROUP_POW2=power_of_two(group),
        FUSED=config.fused,
        num_warps=config.warps,
        num_stages=config.stages,
        **shape,
    )
    if num_splits > 1 and not config.fused:
        _combine_kernel[(q_heads, count)](
            context_lens, out, *scratch[:2], out.stride(0), window or 0, min_keys, num_splits, num_warps=1, **shape
        )
