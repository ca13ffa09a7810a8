"""Rows that live on the device, in Triton: deltas in, inputs of a step out, sampled tokens back. See `cuda.row_ops`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SPAN = 1024
_ROWS = 128
_TOKENS = 256


@triton.jit(do_not_specialize=["count"])
def _write_spans(arena, spans, data, count, SPAN: tl.constexpr):
    index = tl.program_id(0)
    to = tl.load(spans + index)
    start = tl.load(spans + count + index)
    length = tl.load(spans + 2 * count + index)
    offset = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside = offset < length
    tl.store(arena + to + offset, tl.load(data + start + offset, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _prepare(
    history, table, rows, positions, grow_address, grow_value, token_ids, count, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < count
    row = tl.load(rows + index, mask=inside, other=0).to(tl.int64)
    position = tl.load(positions + index, mask=inside, other=0)
    token = tl.load(history + row * WIDTH + position, mask=inside, other=0)
    tl.store(token_ids + index, token.to(tl.int64), mask=inside)
    address = tl.load(grow_address + index, mask=inside, other=0)
    tl.store(table + address, tl.load(grow_value + index, mask=inside, other=0), mask=inside)


@triton.jit
def _expand(
    history,
    table,
    rows,
    starts,
    query_starts,
    token_ids,
    positions,
    slots,
    WIDTH: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    entry = tl.program_id(0)
    row = tl.load(rows + entry).to(tl.int64)
    first = tl.load(query_starts + entry)
    count = tl.load(query_starts + entry + 1) - first
    offset = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    inside = offset < count
    position = (tl.load(starts + entry) + offset).to(tl.int64)
    token = tl.load(history + row * WIDTH + position, mask=inside, other=0)
    block = tl.load(table + row * PAGES + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    tl.store(token_ids + first + offset, token.to(tl.int64), mask=inside)
    tl.store(positions + first + offset, position, mask=inside)
    tl.store(slots + first + offset, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _finish(history, targets, tokens, peaks, out, count, ROWS: tl.constexpr):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = index < count
    token = tl.load(tokens + index, mask=inside, other=0)
    target = tl.load(targets + index, mask=inside, other=0)
    tl.store(history + target, token.to(tl.int32), mask=inside)
    tl.store(out + index, token.to(tl.float64), mask=inside)
    tl.store(out + count + index, tl.load(peaks + index, mask=inside, other=0).to(tl.float64), mask=inside)


class TritonRowOps:
    """Launch shapes depend on shapes and host numbers alone, so `prepare` and `finish` may stand in a CUDA graph."""

    def write_spans(self, arena: Tensor, spans: Tensor, data: Tensor, longest: int) -> None:
        count = spans.shape[1]
        _write_spans[(count, triton.cdiv(longest, _SPAN))](arena, spans, data, count, SPAN=_SPAN)

    def prepare(
        self,
        history: Tensor,
        table: Tensor,
        rows: Tensor,
        positions: Tensor,
        grow_address: Tensor,
        grow_value: Tensor,
        token_ids: Tensor,
    ) -> None:
        count = len(rows)
        _prepare[(triton.cdiv(count, _ROWS),)](
            history, table, rows, positions, grow_address, grow_value, token_ids, count,
            WIDTH=history.shape[1], ROWS=_ROWS,
        )  # fmt: skip

    def expand(
        self,
        history: Tensor,
        table: Tensor,
        rows: Tensor,
        starts: Tensor,
        query_starts: Tensor,
        block_size: int,
        num_tokens: int,
        longest: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        token_ids, positions, slots = (
            torch.empty(num_tokens, dtype=torch.int64, device=history.device) for _ in range(3)
        )
        _expand[(len(rows), triton.cdiv(longest, _TOKENS))](
            history, table, rows, starts, query_starts, token_ids, positions, slots,
            WIDTH=history.shape[1], PAGES=table.shape[1], BLOCK_SIZE=block_size, TOKENS=_TOKENS,
        )  # fmt: skip
        return token_ids, positions, slots

    def finish(self, history: Tensor, targets: Tensor, tokens: Tensor, peaks: Tensor, out: Tensor) -> None:
        count = len(targets)
        _finish[(triton.cdiv(count, _ROWS),)](history, targets, tokens, peaks, out, count, ROWS=_ROWS)
