"""y = x W^T for few rows: all that a step of few tokens does is to read W, once, and as fast as the memory gives it.

What lies between two products is done by the kernel that reads W anyway, so a decoder layer takes six launches instead
of ten:

- before: the RMS norm of x. y = s (x * w) W^T with s = 1 / rms(x), so the sums of squares are gathered in the same pass
  over x and s comes last; x * w is rounded once, where norm and product apart round twice;
- after: a bias, silu(gate) * up of both halves of a gated MLP, or the sum with the residual, in its place: no program
  reads what another writes, since x is another tensor.

W is the left operand: its rows fill the tensor cores' sixteen, and the few rows of x stand where eight are enough. One
row needs no tensor cores. Nothing is split along the inner dimension, so a result does not depend on who comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_table import LinearConfig
from .shapes import ceil_div


@triton.jit(do_not_specialize=["rows"])
def _vector_kernel(
    x, weight, bias, norm, out, rows, x_stride, out_stride, eps,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program (n, t): outputs [n * COLUMNS, (n + 1) * COLUMNS) of row t. See `_matrix_kernel`."""
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.where(place < OUT, place, 0)  # reads something; is not written
    row = tl.program_id(1).to(tl.int64)
    x += row * x_stride
    out += row * out_stride
    depth = tl.arange(0, DEPTH)
    source = weight + column.to(tl.int64)[:, None] * IN + depth[None, :]
    total = tl.zeros((COLUMNS, DEPTH), tl.float32)
    other = tl.zeros((COLUMNS, DEPTH), tl.float32)
    squares = tl.zeros((DEPTH,), tl.float32)
    for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
        inside = start + depth < IN
        a = tl.load(x + start + depth, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += a * a
            a *= tl.load(norm + start + depth, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(source + start, mask=inside[None, :], other=0.0)
        total += w.to(tl.float32) * a[None, :]
        if GATED:
            w = tl.load(source + OUT * IN + start, mask=inside[None, :], other=0.0)
            other += w.to(tl.float32) * a[None, :]
    y, up = tl.sum(total, 1), tl.sum(other, 1)
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares, 0) / IN + eps)
        y, up = y * inverse, up * inverse
    if BIAS:
        y += tl.load(bias + column).to(tl.float32)
        up += tl.load(bias + OUT + column, mask=column < (OUT if GATED else 0), other=0.0).to(tl.float32)
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * up
    if ADD:
        y += tl.load(out + place, mask=place < OUT, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=place < OUT)


@triton.jit(do_not_specialize=["rows"])
def _matrix_kernel(
    x, weight, bias, norm, out, rows, x_stride, out_stride, eps,
    OUT: tl.constexpr, IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Program (n, m): outputs [n * COLUMNS, (n + 1) * COLUMNS) of rows [m * ROWS, (m + 1) * ROWS).

    OUT: outputs of a row; with GATED, half of the rows of weight [2 OUT, IN], of which the first are the gates.
    """
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.where(place < OUT, place, 0)  # reads something; is not written
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    source = weight + column.to(tl.int64)[:, None] * IN + depth[None, :]
    rows_in = x + row.to(tl.int64)[None, :] * x_stride + depth[:, None]
    total = tl.zeros((COLUMNS, ROWS), tl.float32)
    other = tl.zeros((COLUMNS, ROWS), tl.float32)
    squares = tl.zeros((DEPTH, ROWS), tl.float32)
    for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
        inside = start + depth < IN
        a = tl.load(rows_in + start, mask=inside[:, None] & (row < rows)[None, :], other=0.0)
        if NORM:
            wide = a.to(tl.float32)
            squares += wide * wide
            scale = tl.load(norm + start + depth, mask=inside, other=0.0).to(tl.float32)
            a = (wide * scale[:, None]).to(x.dtype.element_ty)
        w = tl.load(source + start, mask=inside[None, :], other=0.0)
        total = tl.dot(w, a, total)
        if GATED:
            w = tl.load(source + OUT * IN + start, mask=inside[None, :], other=0.0)
            other = tl.dot(w, a, other)
    if NORM:
        inverse = tl.rsqrt(tl.sum(squares, 0) / IN + eps)[None, :]
        total, other = total * inverse, other * inverse
    if BIAS:
        total += tl.load(bias + column).to(tl.float32)[:, None]
        other += tl.load(bias + OUT + column, mask=column < (OUT if GATED else 0), other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * other
    goal = out + row.to(tl.int64)[None, :] * out_stride + place[:, None]
    mine = (place < OUT)[:, None] & (row < rows)[None, :]
    if ADD:
        total += tl.load(goal, mask=mine, other=0.0).to(tl.float32)
    tl.store(goal, total.to(out.dtype.element_ty), mask=mine)


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    config: LinearConfig,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add: bool = False,
) -> Tensor:
    """x [T, in] times weight [n, in], into out [T, n], or into [T, n / 2] if gated; rows of x and out are contiguous.

    bfloat16 or float16, sums in float32. norm: [in], x is divided by its root mean square and multiplied by it first;
    for bfloat16 alone, since x * norm might leave the range of float16. gated: the first half of weight (and of bias)
    are gates; silu(gate) * other half. add: to what out holds. out must not share memory with x.
    """
    rows, width = x.shape
    if rows == 0:
        return out
    columns = weight.shape[0] // 2 if gated else weight.shape[0]
    kernel = _vector_kernel if config.rows == 1 else _matrix_kernel
    kernel[(ceil_div(columns, config.columns), ceil_div(rows, config.rows))](
        x,
        weight,
        weight if bias is None else bias,
        weight if norm is None else norm,
        out,
        rows,
        x.stride(0),
        out.stride(0),
        eps,
        OUT=columns,
        IN=width,
        ROWS=config.rows,
        COLUMNS=config.columns,
        DEPTH=config.depth,
        STAGES=config.stages,
        GATED=gated,
        NORM=norm is not None,
        ADD=add,
        BIAS=bias is not None,
        num_warps=config.warps,
    )
    return out


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether these are numbers and strides the kernels can work with."""
    dtypes = (torch.bfloat16, torch.float16)
    return x.dtype in dtypes and weight.dtype is x.dtype and weight.is_contiguous() and x.stride(1) == 1
