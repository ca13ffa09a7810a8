"""Token masks on the wire: `Masks` from bits and back.

A grammar mostly allows either a handful of tokens (the next key of an object) or nearly all (the inside of a string),
and rows of one schema are often at like places. So a mask travels once for all rows that have it, and as those of its
words that are not all zeros, as those that are not all ones, or whole, whichever is shortest. Words, not ids: the masks
of a step are on its critical path, and to find words takes a fraction of the time that it takes to spread them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from treadle.errors import ProtocolError

from .codec import Int32, pack, unpack
from .mask_pages import MaskPages
from .messages import Masks

ONLY, EXCEPT, BITS = 0, 1, 2
ANYTHING = -1
"""In `Masks.rows`: nothing is masked for this row."""

Words = npt.NDArray[np.uint32]
Counts = npt.NDArray[np.intp]
_WIRE_WORD = np.dtype("<u4")
_ALL = np.uint32(0xFFFFFFFF)
_AT_ONCE = 16


@dataclass(frozen=True, slots=True, eq=False)
class GivenMasks:
    """As they travelled, and verified. rows: int32, for each guided row of the step the index of its mask, or ANYTHING.

    width: words of a mask. full: bool [masks], whether the words that are not given are all ones; else all zeros.
    where: int64, ascending, of the masks one after another the words that are given, and values: uint32, what they are.
    whole: int64, masks that are given whole, and bits: uint32 [whole, width]. shared: all are whole, and bits is memory
    that others write again when the step is over.
    """

    rows: Int32
    width: int
    full: npt.NDArray[np.bool_]
    where: Counts
    values: Words
    whole: Counts
    bits: Words
    shared: bool = False

    def words(self) -> Words:
        """uint32 [masks, width]."""
        words = np.zeros((len(self.full), self.width), np.uint32)
        words[self.full] = _ALL
        words[self.whole] = self.bits
        words.reshape(-1)[self.where] = self.values
        return words


@dataclass(frozen=True, slots=True)
class RowMasks:
    """rows: int32, for each guided row of the step the index of its mask, or ANYTHING. words: uint32 [masks, words]."""

    rows: Int32
    words: Words


def words_for(vocab_size: int) -> int:
    """uint32 words of one mask."""
    return -(-vocab_size // 32)


def encode_masks(step: int, words: Words, free: npt.NDArray[np.bool_]) -> Masks:
    """words: uint32 [rows, words_for(vocab_size)], C-contiguous, bits beyond the vocabulary 0. free: bool [rows], whose
    words do not count."""
    rows = np.full(len(words), ANYTHING, np.int32)
    bound = np.flatnonzero(~free)
    first, rows[bound] = _distinct(words if len(bound) == len(words) else words[bound])
    parts = [_encode(words[bound[part]]) for part in _parts(first)] or [_encode(words[:0])]
    kinds, counts, places, given, whole = (np.concatenate(items) for items in zip(*parts, strict=True))
    return Masks(step, pack(rows), pack(kinds), pack(counts), pack(places), _bytes(given), _bytes(whole))


def shared_masks(step: int, free: npt.NDArray[np.bool_]) -> Masks:
    """Of masks that lie in the memory of this step, one for each row. free: bool [rows], whose masks do not count."""
    rows = np.where(free, ANYTHING, np.arange(len(free), dtype=np.int32))
    return Masks(step, pack(rows), b"", b"", b"", b"", b"", shared=True)


def decode_masks(masks: Masks, rows: int, vocab_size: int) -> RowMasks:
    """Masks for `rows` guided rows. Raises ProtocolError for what `encode_masks` would not have made."""
    given = read_masks(masks, rows, vocab_size)
    return RowMasks(given.rows, given.words())


def read_masks(masks: Masks, rows: int, vocab_size: int, pages: MaskPages | None = None) -> GivenMasks:
    """The same without the words that are not given. pages: where masks are that were not sent."""
    if masks.shared:
        return _read_shared(masks, rows, vocab_size, pages)
    index, kinds, counts, places = (unpack(data) for data in (masks.rows, masks.kinds, masks.counts, masks.places))
    width = words_for(vocab_size)
    values, bits = _words(masks.words), _words(masks.bits)
    plain = kinds == BITS
    if (
        index.size != rows
        or kinds.size != counts.size
        or kinds.size > rows
        or (index.size and not (index.min() >= ANYTHING and index.max() < kinds.size))
        or (kinds.size and not (kinds.min() >= ONLY and kinds.max() <= BITS))
        or (counts.size and counts.min() < 0)
        or counts[plain].any()
        or not counts.sum() == places.size == values.size
        or bits.size != int(plain.sum()) * width
        or len(masks.words) + len(masks.bits) != 4 * (values.size + bits.size)
        or (places.size and not (places.min() >= 0 and places.max() < width))
        or (np.diff(where := np.repeat(np.arange(kinds.size) * width, counts) + places) <= 0).any()
    ):
        raise ProtocolError(f"masks of step {masks.step} that do not fit {rows} rows of {vocab_size} tokens")
    return GivenMasks(index, width, kinds == EXCEPT, where, values, plain.nonzero()[0], bits.reshape(-1, width))


def _read_shared(masks: Masks, rows: int, vocab_size: int, pages: MaskPages | None) -> GivenMasks:
    index = unpack(masks.rows)
    sent = masks.kinds or masks.counts or masks.places or masks.words or masks.bits
    if pages is None or pages.width != words_for(vocab_size) or rows > pages.rows:
        raise ProtocolError(f"masks of step {masks.step} in memory that is not shared, or too small for {rows} rows")
    if sent or index.size != rows or (rows and not (index.min() >= ANYTHING and index.max() < rows)):
        raise ProtocolError(f"masks of step {masks.step} that do not fit {rows} rows")
    none, every = np.empty(0, np.intp), np.arange(rows)
    words = pages.words(masks.step, rows)
    return GivenMasks(index, pages.width, np.zeros(rows, np.bool_), none, words[:0, 0], every, words, shared=True)


def _parts(rows: Counts) -> Iterator[Counts]:
    """So many at once that what is computed of them stays in a core's cache."""
    return (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))


def _words(data: bytes) -> Words:
    return np.frombuffer(data, _WIRE_WORD) if len(data) % 4 == 0 else np.empty(0, np.uint32)


def _distinct(words: Words) -> tuple[Counts, Counts]:
    """For the rows of words: where each distinct one stands first, and which of these each row is.

    By a weighted sum of a row's words, checked byte for byte while the row is still in a core's cache: to bring all
    words there once is most of what this takes. Where two differ and sum alike, as those may that differ in the last
    tokens of some words only, the bytes themselves are looked up.
    """
    first: list[int] = []
    which: list[int] = []
    by_sum: dict[int, int] = {}
    by_bytes: dict[bytes, int] = {}
    kept: dict[int, bytes] = {}
    for start in range(0, len(words), _AT_ONCE):
        sums: list[int] = _sums(words[start : start + _AT_ONCE]).tolist()
        for row, total in enumerate(sums, start):
            mask = by_sum.setdefault(total, len(first))
            if mask < len(first):
                data = words[row].tobytes()
                if mask not in kept:
                    kept[mask] = words[first[mask]].tobytes()
                if data != kept[mask]:
                    mask = by_bytes.setdefault(data, len(first))
            if mask == len(first):
                first.append(row)
            which.append(mask)
    return np.array(first, np.intp), np.array(which, np.intp)


def _sums(words: Words) -> npt.NDArray[np.uint64]:
    """Two words at a time: numpy takes a third of the time where it need not widen them."""
    wide = words.view(np.uint64) if words.shape[1] % 2 == 0 else words
    sums: npt.NDArray[np.uint64] = np.einsum("rw,w->r", wide, _weights(wide.shape[1]))
    return sums


@cache
def _weights(words: int) -> npt.NDArray[np.uint64]:
    """Masks often differ by a token or two: so these are unrelated to each other, and odd, lest a sum lose bits."""
    return np.random.default_rng(0).integers(1 << 64, size=words, dtype=np.uint64) | np.uint64(1)


def _encode(words: Words) -> tuple[Counts, Counts, Counts, Words, Words]:
    """kinds and counts of some masks, the places and the words that are given, and the masks that are given whole.

    Of one with less than half of its words to forbid, no other count can be the shorter.
    """
    width = words.shape[1]
    named = words != _ALL
    kinds, counts = np.full(len(words), EXCEPT), _count(named)
    some = np.flatnonzero(2 * counts >= width)
    if some.size:
        allowing = words[some] != 0
        fewer = _count(allowing)
        only = fewer <= counts[some]
        shorter = some[only]
        named[shorter], counts[shorter], kinds[shorter] = allowing[only], fewer[only], ONLY
    plain = 2 * counts >= width  # a word that is named takes two
    kinds[plain], counts[plain], named[plain] = BITS, 0, False
    where = np.flatnonzero(named)
    places = where - np.repeat(np.arange(len(words)) * width, counts)
    return kinds, counts, places, words.reshape(-1)[where], words[plain].reshape(-1)


def _count(flags: npt.NDArray[np.bool_]) -> Counts:
    """How many are set in each row. Row by row it takes an eighth of the time that numpy takes for an axis."""
    return np.array([np.count_nonzero(row) for row in flags], np.intp)


def _bytes(words: Words) -> bytes:
    return words.astype(_WIRE_WORD, copy=False).tobytes()
