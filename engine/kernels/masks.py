# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Masks of guided rows: only what is forbidden is written, and nothing of the logits is read.

Their arrays lie in one packet, each wherever the one before it ends, and must not have a kernel compiled for that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096
_PUT = 1024


def put_words_fused(words: torch.Tensor, where: torch.Tensor, values: torch.Tensor) -> None:
    """words: contiguous, of 32 bits, fewer than 2³¹. where, values: int32 [K]: values[k] goes to place where[k]."""
    count = len(where)
    if count:
        _put[(triton.cdiv(count, _PUT),)](words, where, values, count, SIZE=_PUT)


@triton.jit(do_not_specialize=("count",), do_not_specialize_on_alignment=("where", "values"))
def _put(words, where, values, count, SIZE: tl.constexpr):
    item = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = item < count
    tl.store(words + tl.load(where + item, mask=inside, other=0), tl.load(values + item, mask=inside), mask=inside)


def mask_logits_fused(
    logits: torch.Tensor, places: torch.Tensor, index: torch.Tensor, words: torch.Tensor, offset: int
) -> None:
    """Makes minus infinity of what is not allowed, in place.

    logits: [S, vocab_local] of any float type, last dimension contiguous. places, index: of any integer type, [G]: row
    places[g] of the logits has mask index[g]. words: int32 [masks, words], last dimension contiguous; column c of the
    logits is bit c + offset.
    """
    columns = logits.shape[1]
    if columns and len(places):
        _mask[len(places), triton.cdiv(columns, TILE)](
            logits, logits.stride(0), places, index, words, words.stride(0), columns, offset, TILE=TILE
        )


@triton.jit(
    do_not_specialize=("stride", "words_stride", "columns", "offset"),
    do_not_specialize_on_alignment=("places", "index", "words"),
)
def _mask(logits, stride, places, index, words, words_stride, columns, offset, TILE: tl.constexpr):
    entry = tl.program_id(0)
    row = tl.load(places + entry).to(tl.int64)
    mask = tl.load(index + entry).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    bit = column + offset
    word = tl.load(words + mask * words_stride + (bit >> 5), mask=inside, other=-1)
    banned = ((word >> (bit & 31)) & 1) == 0
    tl.store(logits + row * stride + column, float("-inf"), mask=inside & banned)
