"""Token masks on the wire: `Masks` from bits and back.

A grammar mostly allows either a handful of tokens (the next key of an object) or nearly all (the inside of a string),
and rows of one schema are often at like places. So a mask travels once for all rows that have it, and as the ids it
allows, as the ids it forbids, or as bits, whichever is shortest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from treadle.errors import ProtocolError

from .codec import Int32, pack, unpack
from .messages import Masks

ONLY, EXCEPT, BITS = 0, 1, 2
ANYTHING = -1
"""In `Masks.rows`: nothing is masked for this row."""

Words = npt.NDArray[np.uint32]
_WIRE_WORD = np.dtype("<u4")
_ALL = np.uint32(0xFFFFFFFF)
_ONES = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(axis=1, dtype=np.uint8)
"""How many bits of a 16-bit number are set. numpy counts them itself from 2.0 on."""


@dataclass(frozen=True, slots=True)
class RowMasks:
    """rows: int32, for each guided row of the step the index of its mask, or ANYTHING. words: uint32 [masks, words]."""

    rows: Int32
    words: Words


def words_for(vocab_size: int) -> int:
    """uint32 words of one mask."""
    return -(-vocab_size // 32)


def encode_masks(step: int, words: Words, free: npt.NDArray[np.bool_], vocab_size: int) -> Masks:
    """words: uint32 [rows, words_for(vocab_size)], bits beyond the vocabulary 0. free: bool [rows], whose words do not
    count."""
    rows = np.full(len(words), ANYTHING, np.int32)
    bound = np.flatnonzero(~free)
    first, which = _distinct(words[bound])
    rows[bound] = which
    distinct = words[bound[first]]
    return _encode_distinct(step, rows, distinct, vocab_size)


def decode_masks(masks: Masks, rows: int, vocab_size: int) -> RowMasks:
    """Masks for `rows` guided rows. Raises ProtocolError for what `encode_masks` would not have made."""
    index, kinds, counts, ids = (unpack(data) for data in (masks.rows, masks.kinds, masks.counts, masks.ids))
    width = words_for(vocab_size)
    bits = np.frombuffer(masks.bits, _WIRE_WORD) if len(masks.bits) % 4 == 0 else np.empty(0, np.uint32)
    plain = kinds == BITS
    if (
        index.size != rows
        or kinds.size != counts.size
        or (index.size and not (index.min() >= ANYTHING and index.max() < kinds.size))
        or (counts.size and counts.min() < 0)
        or counts.sum() != ids.size
        or bits.size != int(plain.sum()) * width
        or len(masks.bits) != 4 * bits.size
        or (ids.size and not (ids.min() >= 0 and ids.max() < vocab_size))
    ):
        raise ProtocolError(f"masks of step {masks.step} that do not fit {rows} rows of {vocab_size} tokens")
    words = np.zeros((kinds.size, width), np.uint32)
    _enter_ids(words, counts, ids)
    inverted = kinds == EXCEPT
    words[inverted] ^= _ALL
    words[plain] = bits.reshape(-1, width)
    return RowMasks(index, words)


def _distinct(words: Words) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """For the rows of words: where each distinct one stands first, and which of these each row is.

    By a weighted sum of a row's words, checked word for word; in the unlikely case that two differ and sum alike, every
    row counts as distinct.
    """
    weights = np.arange(words.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B1) | np.uint32(1)
    sums = (words * weights).sum(axis=1, dtype=np.uint32)
    _, first, which = np.unique(sums, return_index=True, return_inverse=True)
    if len(first) == len(words) or np.array_equal(words, words[first[which]]):
        return first, which
    every = np.arange(len(words))
    return every, every


def _encode_distinct(step: int, rows: Int32, words: Words, vocab_size: int) -> Masks:
    allowed = _ONES[np.ascontiguousarray(words).view(np.uint16)].sum(axis=1, dtype=np.int64)
    kinds = np.where(2 * allowed > vocab_size, EXCEPT, ONLY)
    counts = np.where(kinds == EXCEPT, vocab_size - allowed, allowed)
    plain = counts >= words.shape[1]
    kinds[plain], counts[plain] = BITS, 0
    named = words[~plain] ^ np.where(kinds[~plain] == EXCEPT, _ALL, np.uint32(0))[:, None]
    if vocab_size % 32:
        named[:, -1] &= np.uint32((1 << vocab_size % 32) - 1)
    bits = words[plain].astype(_WIRE_WORD, copy=False).tobytes()
    return Masks(step, pack(rows), pack(kinds), pack(counts), pack(_ids(named)), bits)


def _ids(words: Words) -> npt.NDArray[np.intp]:
    """The ids of all bits that are set, row by row, ascending. Looks into words that are not 0 only."""
    row, place = words.nonzero()
    bits = np.unpackbits(words[row, place].astype(_WIRE_WORD).view(np.uint8), bitorder="little")
    entry, bit = bits.reshape(-1, 32).nonzero()
    return place[entry] * 32 + bit


def _enter_ids(words: Words, counts: Int32, ids: Int32) -> None:
    """Sets each row's bits. Ids of a row ascend, so those of one word stand together."""
    if not ids.size:
        return
    where = np.repeat(np.arange(len(counts)) * words.shape[1], counts) + (ids >> 5)
    bits = np.left_shift(np.uint32(1), (ids & 31).astype(np.uint32))
    starts = np.flatnonzero(np.diff(where, prepend=-1))
    words.reshape(-1)[where[starts]] = np.bitwise_or.reduceat(bits, starts)
