"""The sum over the ranks, the residual and the norm in one launch: one-shot through memory that every GPU maps."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .shapes import power_of_two

# Programs of a launch at most, each with its flags.
MOST_PROGRAMS = 256
_PER_THREAD = 16
_MIN_WARPS, _MAX_WARPS = 4, 16


@triton.jit
def _meet(addresses, flags, rank, WORLD: tl.constexpr):
    """Returns when the same program of every rank is here, so that all that their streams did before is done.

    A flag counts how often its owner is ahead of us, 0 or 1, or 2 for a moment: they add one to ours, we take it off
    again. Kernels end before the next of their stream begin, which orders the data; so the flags need not.
    """
    program = tl.program_id(0)
    for peer in tl.static_range(WORLD):
        if peer != rank:
            theirs = (tl.load(addresses + peer) + flags).to(tl.pointer_type(tl.int32))
            tl.atomic_add(theirs + program * WORLD + rank, 1, sem="relaxed", scope="sys")
    ours = (tl.load(addresses + rank) + flags).to(tl.pointer_type(tl.int32)) + program * WORLD
    for peer in tl.static_range(WORLD):
        if peer != rank:
            while tl.atomic_add(ours + peer, 0, sem="acquire", scope="sys") < 1:
                pass
            tl.atomic_add(ours + peer, -1, sem="relaxed", scope="sys")


@triton.jit(do_not_specialize=["rank", "rows"])
def _sum_add_norm_kernel(
    addresses, offset, flags, rank, residual, weight, out, rows, eps,
    WORLD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program p: rows p, p + programs, ...; STEPS of them at most. The ranks are added in order, in float32."""
    _meet(addresses, flags, rank, WORLD)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    for step in range(STEPS):
        row = tl.program_id(0) + step * tl.num_programs(0)
        mine = inside & (row < rows)
        place = row.to(tl.int64) * WIDTH + column
        total = tl.zeros((BLOCK,), tl.float32)
        for peer in tl.static_range(WORLD):
            part = (tl.load(addresses + peer) + offset).to(tl.pointer_type(residual.dtype.element_ty))
            part = tl.multiple_of(part, 16)
            total += tl.load(part + place, mask=mine, other=0.0).to(tl.float32)
        total += tl.load(residual + place, mask=mine, other=0.0).to(tl.float32)
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + place, rounded, mask=mine)
        value = rounded.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        normed = (value * inverse).to(out.dtype.element_ty).to(tl.float32)
        tl.store(out + place, (normed * scale).to(out.dtype.element_ty), mask=mine)


def sum_add_norm(
    addresses: Tensor, offset: int, flags: int, rank: int, residual: Tensor, weight: Tensor, out: Tensor, eps: float
) -> None:
    """residual [T, hidden] += the sum over the ranks, and out = its norm times weight [hidden].

    addresses: int64 [ranks], of the memory that all ranks map, 16-byte aligned. offset: bytes from there to a rank's
    part [T, hidden], of residual's dtype. flags: bytes to int32 [MOST_PROGRAMS, ranks], zero at first; every rank must
    call this with equal shapes, in the same order. The part may be written again when a *later* call has returned.
    """
    rows, width = residual.shape
    programs = min(rows, MOST_PROGRAMS)
    block = power_of_two(width)
    warps = min(max(block // (32 * _PER_THREAD), _MIN_WARPS), _MAX_WARPS)
    _sum_add_norm_kernel[(programs,)](
        addresses, offset, flags, rank, residual, weight, out, rows, eps,
        WORLD=addresses.numel(), WIDTH=width, BLOCK=block, STEPS=-(-rows // programs), num_warps=warps,
    )  # fmt: skip
