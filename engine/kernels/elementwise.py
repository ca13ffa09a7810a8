"""The small operations between the matrix products, one launch each. Arithmetic is fp32; rounding is `TorchOps`'s."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from treadle.engine.ops import HeadLayout, KVSlots

from .rope import rope_store
from .shapes import ceil_div, power_of_two

__all__ = ["TritonOps", "add_rms_norm", "rms_norm", "rope_store", "silu_mul"]

# Elements that one thread of a norm keeps in registers, and the widest and narrowest block of threads.
_PER_THREAD = 16
_MIN_WARPS, _MAX_WARPS = 2, 16
_SILU_BLOCK = 1024
_SILU_WARPS = 4


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """One program per row of [T, WIDTH]."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(residual + row + column, rounded, mask=inside)
        value = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    normed = (value * inverse).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row + column, (normed * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul_kernel(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Program (t, b): columns [b * BLOCK, (b + 1) * BLOCK) of row t."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * (2 * WIDTH) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * (2 * WIDTH) + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * WIDTH + column, (silu * up).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, hidden] over its root mean square, times weight [hidden], into a new tensor."""
    out = torch.empty_like(x)
    _launch_norm(x, x, weight, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to residual in place, rounded to its dtype, and returns the norm of the sum in x's memory."""
    _launch_norm(x, residual, weight, x, eps, add=True)
    return x


def _launch_norm(x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, eps: float, add: bool) -> None:
    rows, width = x.shape
    if rows == 0:
        return
    block = power_of_two(width)
    warps = min(max(block // (32 * _PER_THREAD), _MIN_WARPS), _MAX_WARPS)
    _rms_norm_kernel[(rows,)](x, residual, weight, out, eps, WIDTH=width, BLOCK=block, ADD=add, num_warps=warps)


def silu_mul(gate_up: Tensor, *, block: int = _SILU_BLOCK, warps: int = _SILU_WARPS) -> Tensor:
    """[T, 2n], the gate first, to silu(gate) * up [T, n]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    if rows:
        grid = (rows, ceil_div(width, block))
        _silu_mul_kernel[grid](gate_up, out, WIDTH=width, BLOCK=block, num_warps=warps)
    return out


class TritonOps:
    """`engine.ops.Ops` on NVIDIA GPUs."""

    name = "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x, residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)

    def rope_store(
        self, qkv: Tensor, layout: HeadLayout, rope: tuple[Tensor, Tensor], positions: Tensor, target: KVSlots
    ) -> Tensor:
        return rope_store(qkv, layout, rope, positions, target)
