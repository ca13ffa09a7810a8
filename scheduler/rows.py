"""What a step needs to know of the sequences that run, as a structure of arrays indexed by row.

Three counters say everything about a row's progress:

- `known`: committed tokens. Only `commit` moves it.
- `frontier`: known tokens and those that planned steps will sample. Only planning moves it.
- `computed`: tokens whose K/V exists once all planned steps have run. Only planning moves it.

A row *needs* `frontier - computed` tokens; one is a decode, more is a prefill. A row with `frontier == limit` has
everything planned that it will ever get. A row that is free has zero in all of them and so never needs anything.

Where nearly all rows take part, arithmetic with all of them is as quick as finding those in one array by their numbers.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from treadle.kvcache import Blocks, Parent
from treadle.kvcache.arrays import constant, floats_of, numbers_of
from treadle.transport.codec import Int32

from .request import Sequence

Rows1D = npt.NDArray[np.intp]
Int64 = npt.NDArray[np.int64]

ONE: Final = constant(1)

WIRE_INT: Final = np.dtype("<i4")
NOBODY: Final = np.iinfo(np.int64).min
NEVER: Final = np.iinfo(np.int32).max

_FREE: Final[Int64] = np.array([0, 0, 0, NEVER, 0, 0, NEVER, NOBODY])
"""Of a row that is free: known, frontier, computed, limit, nblocks, admission, publish_at, order."""


def span(rows: Rows1D) -> Rows1D | slice:
    """The same rows, which rise, as a slice where they have no gap: reading it copies nothing, and is several times as
    fast. In a full house nearly all steps are so."""
    first, last = rows.item(0), rows.item(-1)
    return slice(first, last + 1) if last - first == rows.size - 1 else rows


class Rows:
    """The arrays. tokens: int32 [rows, max_blocks * block_size], table: [rows, max_blocks], the others one number
    per row. `_tokens` and `_table` show the same memory with one index, by which numpy finds an entry of each row in a
    third of the time; rows begin there at `_token_begin` and `_block_begin`. `_token_bytes`, `known_of` and the like
    show it as memoryviews, in which one entry is found in less than half of the time.

    limit: tokens at which the row ends. nblocks: entries of its block table. publish_at: what `filled` has to come to
    for the row's next block to be published, NEVER where the prefix cache asks for blocks (`PrefixCache.follow`).
    admission: unique number of the row's present use, 0 when free. order, key: of its sequence, NOBODY and 0 when free.
    guided: its samples wait for masks; guided_count: how many rows are so. owner: its sequence. chain: where its next
    published block hangs. entries: of all block tables. free: rows that are not in use; count: how many are.
    Big arrays come from `np.zeros`, so memory is touched only where a row has been. Counters are as wide as an index,
    which numpy would otherwise make of them each time that they are used as one.
    """

    def __init__(self, max_rows: int, max_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        width = max_blocks * block_size
        self.tokens: Int32 = np.zeros((max_rows, width), np.int32)
        self.table: Blocks = np.zeros((max_rows, max_blocks), np.int64)
        self._tokens = self.tokens.reshape(-1)
        self._token_bytes = self._tokens.data.cast("B")
        self._row_bytes = width * WIRE_INT.itemsize
        self._table = self.table.reshape(-1)
        self._token_begin: Int64 = np.arange(max_rows, dtype=np.int64) * width
        self._block_begin: Int64 = np.arange(max_rows, dtype=np.int64) * max_blocks
        self._numbers: Int64 = np.repeat(_FREE[:, None], max_rows, axis=1)  # one array, so one operation vacates a row
        self.known: Int64 = self._numbers[0]
        self.frontier: Int64 = self._numbers[1]
        self.computed: Int64 = self._numbers[2]
        self.limit: Int64 = self._numbers[3]
        self.nblocks: Int64 = self._numbers[4]
        self.admission: Int64 = self._numbers[5]
        self.publish_at: Int64 = self._numbers[6]
        self.order: Int64 = self._numbers[7]
        self.known_of = numbers_of(self.known)
        self.frontier_of = numbers_of(self.frontier)
        self.computed_of = numbers_of(self.computed)
        self._limit_of = numbers_of(self.limit)
        self.nblocks_of = numbers_of(self.nblocks)
        self._admission_of = numbers_of(self.admission)
        self.publish_at_of = numbers_of(self.publish_at)
        self._order_of = numbers_of(self.order)
        self.entries = 0
        self.key: npt.NDArray[np.float64] = np.zeros(max_rows, np.float64)
        self._key_of = floats_of(self.key)
        self.guided: npt.NDArray[np.bool_] = np.zeros(max_rows, np.bool_)
        self.guided_count = 0
        self.owner: npt.NDArray[np.object_] = np.full(max_rows, None, np.object_)
        self.chain: list[Parent] = [""] * max_rows
        self.free = list(range(max_rows - 1, -1, -1))
        self.count = 0

    def occupy(self, sequence: Sequence, admission: int, hit: Blocks, fresh: Blocks, computed: int) -> int:
        """Gives the sequence a free row that holds its tokens and its block table, a hit and what is fresh behind it;
        returns the row."""
        row = self.free.pop()
        self.count += 1
        request, tokens = sequence.request, sequence.tokens
        begin, known, found, held = row * self._row_bytes, sequence.known, hit.size, hit.size + fresh.size
        self._token_bytes[begin : begin + len(tokens)] = tokens
        if found:
            self.table[row, :found] = hit
        self.table[row, found:held] = fresh
        self.known_of[row] = known
        self.frontier_of[row] = known
        self.computed_of[row] = computed
        self._limit_of[row] = request.limit
        self.nblocks_of[row] = held
        self.entries += held
        self._admission_of[row] = admission
        self._order_of[row] = sequence.order
        self._key_of[row] = sequence.key
        if request.guided:
            self.guided[row] = True
            self.guided_count += 1
        self.owner[row] = sequence
        return row

    def vacate(self, row: int) -> None:
        self.entries -= self.nblocks_of[row]
        self._numbers[:, row] = _FREE
        self._key_of[row] = 0.0
        if self.guided_count:
            self.guided_count -= int(self.guided[row])
            self.guided[row] = False
        self.owner[row] = None
        self.chain[row] = ""
        self.free.append(row)
        self.count -= 1

    def blocks_of(self, row: int) -> Blocks:
        """Its block table, as long as nobody changes it."""
        return self.table[row, : self.nblocks_of[row]]

    def filled(self, row: int) -> int:
        """Its committed tokens whose K/V exists once all planned steps have run."""
        known, computed = self.known_of[row], self.computed_of[row]
        return known if known < computed else computed

    def append_blocks(self, rows: Rows1D, blocks: Blocks) -> None:
        held = self.nblocks[rows]
        self._table[self._block_begin[rows] + held] = blocks
        self.nblocks[rows] = held + ONE
        self.entries += rows.size

    def contents(self, row: int, first: int, last: int) -> tuple[bytes, Blocks]:
        """Tokens (int32 bytes) and numbers of its blocks from `first` to before `last`."""
        begin, size = row * self._row_bytes, self._block_size * WIRE_INT.itemsize
        return self._token_bytes[begin + first * size : begin + last * size].tobytes(), self.table[row, first:last]

    def advance(self, decoding: Int64) -> int:
        """Plans one token where that is all that a row needs: its K/V, and a sample. decoding: 1 there, 0 elsewhere.
        Returns the K/V positions that they read."""
        np.add(self.frontier, decoding, self.frontier)
        computed = np.add(self.computed, decoding, self.computed)
        return int(computed.dot(decoding))

    def commit(self, at: Rows1D | slice, sampled: Int64, tokens: Int32) -> None:
        """Appends the token that came back to each row. at: the rows, or their `span`. sampled: 1 for each of them, 0
        elsewhere."""
        self._tokens[(self._token_begin + self.known)[at]] = tokens
        np.add(self.known, sampled, self.known)
