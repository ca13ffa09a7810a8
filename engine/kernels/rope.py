"""Norm and rotation of queries and keys, and the write of keys and values to their pages, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from treadle.engine.ops import HeadLayout, KVSlots

from .shapes import ceil_div, power_of_two

# A program takes about this many elements of one token: enough for 16-byte accesses by every thread of two warps.
_ELEMENTS = 1024
_PER_THREAD = 8


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rope_store_kernel(
    qkv,
    q_norm,
    k_norm,
    cosines,
    sines,
    positions,
    slots,
    k_cache,
    v_cache,
    qkv_stride,
    k_stride,
    v_stride,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Program (t, b): HEADS heads of token t. The first blocks are of queries, then come keys, then values.

    Queries are written back where they were; a program reads all of its elements before it writes any.
    """
    half: tl.constexpr = DIM // 2
    q_blocks: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    head = tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, HALF_PAD)[None, :]
    row = qkv + token * qkv_stride

    if block < q_blocks:
        head += block * HEADS
        inside = (head < Q_HEADS) & (pair < half)
        a = tl.load(row + head * DIM + pair, mask=inside, other=0.0)
        b = tl.load(row + head * DIM + half + pair, mask=inside, other=0.0)
        a, b = _norm_rotate(a, b, q_norm, cosines, sines, positions + token, pair, eps, half, NORM)
        tl.store(row + head * DIM + pair, a, mask=inside)
        tl.store(row + head * DIM + half + pair, b, mask=inside)
    else:
        slot = tl.load(slots + token)
        page = slot // BLOCK_SIZE
        place = slot % BLOCK_SIZE
        block -= q_blocks
        if block < kv_blocks:
            head += block * HEADS
            inside = (head < KV_HEADS) & (pair < half)
            source = row + (Q_HEADS + head) * DIM + pair
            a = tl.load(source, mask=inside, other=0.0)
            b = tl.load(source + half, mask=inside, other=0.0)
            a, b = _norm_rotate(a, b, k_norm, cosines, sines, positions + token, pair, eps, half, NORM)
            goal = k_cache + page * k_stride + (head * BLOCK_SIZE + place) * DIM + pair
            tl.store(goal, a.to(k_cache.dtype.element_ty), mask=inside)
            tl.store(goal + half, b.to(k_cache.dtype.element_ty), mask=inside)
        else:
            head += (block - kv_blocks) * HEADS
            inside = (head < KV_HEADS) & (pair < half)
            source = row + (Q_HEADS + KV_HEADS + head) * DIM + pair
            a = tl.load(source, mask=inside, other=0.0)
            b = tl.load(source + half, mask=inside, other=0.0)
            goal = v_cache + page * v_stride + (head * BLOCK_SIZE + place) * DIM + pair
            tl.store(goal, a.to(v_cache.dtype.element_ty), mask=inside)
            tl.store(goal + half, b.to(v_cache.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotate(a, b, weight, cosines, sines, position, pair, eps, half: tl.constexpr, NORM: tl.constexpr):
    """The halves a, b [heads, half] of each head: RMS norm over the head if asked, then the rotation, then rounding."""
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    inside = pair < half
    angle = tl.load(position) * half + pair
    cos = tl.load(cosines + angle, mask=inside, other=0.0)
    sin = tl.load(sines + angle, mask=inside, other=0.0)
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * half) + eps)[:, None]
        weight_a = tl.load(weight + pair, mask=inside, other=0.0).to(tl.float32)
        weight_b = tl.load(weight + half + pair, mask=inside, other=0.0).to(tl.float32)
        a = ((a * inverse).to(dtype).to(tl.float32) * weight_a).to(dtype).to(tl.float32)
        b = ((b * inverse).to(dtype).to(tl.float32) * weight_b).to(dtype).to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


def rope_store(
    qkv: Tensor,
    layout: HeadLayout,
    rope: tuple[Tensor, Tensor],
    positions: Tensor,
    target: KVSlots,
    *,
    elements: int = _ELEMENTS,
) -> Tensor:
    """See `engine.ops.Ops.rope_store`. Returns the queries in place: a view [T, q_heads, head_dim] of qkv."""
    tokens, dim = qkv.shape[0], layout.head_dim
    queries = qkv[:, : layout.q_heads * dim].view(tokens, layout.q_heads, dim)
    if tokens == 0:
        return queries
    half_pad = power_of_two(dim // 2)
    heads = max(1, min(elements // (2 * half_pad), power_of_two(max(layout.q_heads, layout.kv_heads))))
    norm = layout.q_norm is not None and layout.k_norm is not None
    blocks = ceil_div(layout.q_heads, heads) + 2 * ceil_div(layout.kv_heads, heads)
    _rope_store_kernel[(tokens, blocks)](
        qkv,
        layout.q_norm if norm else qkv,
        layout.k_norm if norm else qkv,
        rope[0],
        rope[1],
        positions,
        target.slots,
        target.k,
        target.v,
        qkv.stride(0),
        target.k.stride(0),
        target.v.stride(0),
        layout.eps,
        Q_HEADS=layout.q_heads,
        KV_HEADS=layout.kv_heads,
        DIM=dim,
        HALF_PAD=half_pad,
        BLOCK_SIZE=target.k.shape[2],
        HEADS=heads,
        NORM=norm,
        num_warps=max(1, min(4, heads * half_pad // (32 * _PER_THREAD))),
    )
    return queries
