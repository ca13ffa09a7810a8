"""A rank's mirror of the rows: what the deltas of the plans add up to (D3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from treadle.errors import ProtocolError
from treadle.transport.codec import Int32, unpack
from treadle.transport.messages import RowStart, StepPlan

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Work:
    """A step's work, one entry per row, decode rows (one token) first, each group in plan order.

    plan_order: index into the plan's rows of each entry. samples: whether the row samples in this step.
    starts: first position computed. counts: how many. grow_rows, grow_pages: where a block was appended in this step.
    whole: a decode row begins here behind a cached prefix. A row of this step may be what writes that. In the plan it
    stands before its finder; here, decode rows being first, behind it. So the step must not be cut.
    """

    rows: Int64
    counts: Int64
    starts: Int64
    samples: npt.NDArray[np.bool_]
    plan_order: Int64
    num_decode: int
    grow_rows: Int64
    grow_pages: Int64
    whole: bool


class RowMirror:
    """Structure of arrays by row, in host memory.

    tokens: int32 [max_rows, max_len], shared with the torch tensor `tokens_tensor`. known: tokens there are, sampled
    ones included. computed: tokens whose K/V is written. table: int32 [max_rows, max_blocks]. Rows not in use are -1
    (poisoned) in debug mode.
    """

    def __init__(self, max_rows: int, max_len: int, block_size: int, num_blocks: int, debug: bool = False) -> None:
        self._max_blocks = -(-max_len // block_size)
        self._num_blocks = num_blocks
        self._debug = debug
        self.block_size = block_size
        self.tokens = np.zeros((max_rows, max_len + 1), np.int32)
        self.tokens_tensor = torch.from_numpy(self.tokens)
        self.table = np.zeros((max_rows, self._max_blocks), np.int32)
        self.known = np.zeros(max_rows, np.int64)
        self.computed = np.zeros(max_rows, np.int64)
        self.prompt_len = np.zeros(max_rows, np.int64)
        self.num_blocks = np.zeros(max_rows, np.int64)
        self.active = np.zeros(max_rows, np.bool_)

    def apply(self, plan: StepPlan) -> Work:
        """Takes the plan's releases, starts and blocks over, and returns its work. Raises ProtocolError."""
        self._release(unpack(plan.release))
        for start in plan.start:
            self._start(start)
        grow_rows = unpack(plan.grow_rows).astype(np.int64)
        pages = self._grow(grow_rows, unpack(plan.grow_blocks))
        rows, counts = unpack(plan.rows).astype(np.int64), unpack(plan.counts).astype(np.int64)
        finders = [start.row for start in plan.start if start.computed]
        return self._work(rows, counts, grow_rows, pages, finders)

    def commit(self, work: Work, sampled: Int64) -> None:
        """Advances over the work that was done; `sampled` are the new tokens in the work's order."""
        rows = work.rows[work.samples]
        self.tokens[rows, self.known[rows]] = sampled
        self.advance(work)

    def advance(self, work: Work) -> None:
        """The same where the tokens are kept elsewhere: there is one more of each row that samples, whatever it is."""
        self.computed[work.rows] += work.counts
        self.known[work.rows] += work.samples

    def forget(self) -> None:
        """Releases every row, for a scheduler that starts anew on loaded ranks."""
        self._release(np.flatnonzero(self.active).astype(np.int32))

    def _release(self, rows: Int32) -> None:
        if rows.size and not self.active[rows].all():
            raise ProtocolError(f"release of a row that is not in use, among {rows.tolist()}")
        self.active[rows] = False
        if self._debug:
            self.tokens[rows] = -1
            self.table[rows] = -1

    def _start(self, start: RowStart) -> None:
        row, tokens, blocks = start.row, unpack(start.tokens), unpack(start.blocks)
        if not 0 <= row < len(self.active) or self.active[row]:
            raise ProtocolError(f"start of row {row}, which is in use or out of range")
        if tokens.size >= self.tokens.shape[1] or blocks.size > self._max_blocks or start.computed >= tokens.size:
            raise ProtocolError(f"start of row {row} with {tokens.size} tokens and {blocks.size} blocks: too long")
        self.tokens[row, : tokens.size] = tokens
        self.table[row, : blocks.size] = self._checked(blocks)
        self.known[row] = tokens.size
        self.computed[row] = start.computed
        self.prompt_len[row] = start.prompt_len
        self.num_blocks[row] = blocks.size
        self.active[row] = True

    def _grow(self, rows: Int64, blocks: Int32) -> Int64:
        """Appends a block to each row's table, a row may come twice; returns the places in the tables."""
        if not rows.size:
            return rows
        self._checked(blocks)
        if rows.size != blocks.size or rows.min() < 0 or rows.max() >= len(self.active):
            raise ProtocolError(f"{blocks.size} blocks for the rows {rows.tolist()}")
        pages = self.num_blocks[rows]
        for index in range(rows.size) if not (rows[1:] > rows[:-1]).all() else ():  # ascending: each comes once
            pages[index] += int((rows[:index] == rows[index]).sum())
        if pages.max() >= self._max_blocks:
            raise ProtocolError(f"more than {self._max_blocks} blocks for a row among {rows.tolist()}")
        self.table[rows, pages] = blocks
        np.add.at(self.num_blocks, rows, 1)
        return pages

    def _checked(self, blocks: Int32) -> Int32:
        if blocks.size and not (blocks.min() > 0 and blocks.max() < self._num_blocks):
            raise ProtocolError(f"a block outside 1..{self._num_blocks - 1} in {blocks.tolist()}")
        return blocks

    def _work(self, rows: Int64, counts: Int64, grow_rows: Int64, grow_pages: Int64, finders: Sequence[int]) -> Work:
        starts = self.computed[rows]
        ends = starts + counts
        if (
            not self.active[rows].all()
            or (ends > self.known[rows]).any()
            or (ends > self.num_blocks[rows] * self.block_size).any()
            or (counts < 1).any()
        ):
            raise ProtocolError(f"work beyond what the rows {rows.tolist()} know or have blocks for")
        order = np.argsort(counts > 1, kind="stable")
        return Work(
            rows=rows[order],
            counts=counts[order],
            starts=starts[order],
            samples=(ends == self.known[rows])[order],
            plan_order=order,
            num_decode=int((counts == 1).sum()),
            grow_rows=grow_rows,
            grow_pages=grow_pages,
            whole=bool(finders) and bool(np.isin(finders, rows[counts == 1]).any()),
        )


def spans(work: Work) -> Iterator[tuple[int, int, int, int]]:
    """(row, first position, count, offset in the flat batch) of each entry, in order."""
    offset = 0
    for row, start, count in zip(work.rows.tolist(), work.starts.tolist(), work.counts.tolist(), strict=True):
        yield row, start, count, offset
        offset += count
