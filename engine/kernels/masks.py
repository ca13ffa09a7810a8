# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Masks of guided rows: only what is forbidden is written, and nothing of the logits is read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 4096


def mask_logits_fused(
    logits: torch.Tensor, places: torch.Tensor, index: torch.Tensor, words: torch.Tensor, offset: int
) -> None:
    """Makes minus infinity of what is not allowed, in place.

    logits: [S, vocab_local] of any float type, last dimension contiguous. places, index: int64 [G]: row places[g] of
    the logits has mask index[g]. words: int32 [masks, words]; column c of the logits is bit c + offset.
    """
    columns = logits.shape[1]
    if columns and len(places):
        _mask[len(places), triton.cdiv(columns, TILE)](
            logits, logits.stride(0), places, index, words, words.stride(0), columns, offset, TILE=TILE
        )


@triton.jit(do_not_specialize=("stride", "words_stride", "columns", "offset"))
def _mask(logits, stride, places, index, words, words_stride, columns, offset, TILE: tl.constexpr):
    entry = tl.program_id(0)
    row = tl.load(places + entry)
    mask = tl.load(index + entry)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    bit = column + offset
    word = tl.load(words + mask * words_stride + (bit >> 5), mask=inside, other=-1)
    banned = ((word >> (bit & 31)) & 1) == 0
    tl.store(logits + row * stride + column, float("-inf"), mask=inside & banned)
