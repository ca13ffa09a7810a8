"""When the masks of a step can be made: as soon as all tokens before its samples are committed.

Step N + 1 is planned while N runs (docs/scheduler.md), so a guided row of it does not know its last token yet, and no
grammar can say what may follow. Until N's result is applied the step stands here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from treadle.kvcache.arrays import all_of
from treadle.scheduler.flight import Flight
from treadle.scheduler.request import NO_ROW, Sequence
from treadle.scheduler.rows import Int64, Rows1D
from treadle.scheduler.running import Running
from treadle.transport.codec import Int32, pack, unpack


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """The guided rows of a step. lengths: tokens that there are before each sample. admissions: of the rows when they
    were planned. sequences: whose they were."""

    number: int
    rows: Rows1D
    admissions: Int64
    lengths: Int64
    sequences: list[Sequence]


@dataclass(frozen=True, slots=True)
class MasksDue:
    """One entry for each guided row of the plan, in its order. To be read at once: it looks into the rows' memory.

    sequences: None where nobody wants the token any more. lengths: committed tokens, prompt included, which is what the
    sample follows. last: the last of these, int32 ids.
    """

    step: int
    sequences: list[Sequence | None]
    lengths: list[int]
    last: list[int]
    running: Running

    def output(self, index: int, first: int) -> list[int]:
        """Committed output tokens from number `first` on; the last one alone is there already."""
        sequence = self.sequences[index]
        if sequence is None:
            return []
        begin, end = sequence.request.prompt_len + first, self.lengths[index]
        if end - begin < 2:
            return self.last[index : index + 1] if end > begin else []
        tokens: list[int] = _tokens(self.running, sequence)[begin:end].tolist()
        return tokens


class PendingMasks:
    """Steps in flight whose masks nobody was asked for yet, oldest first.

    The ranks wait for masks, so what is done for a row is done for all rows by a few vector operations.
    """

    def __init__(self, running: Running) -> None:
        self._running = running
        self._steps: deque[_Step] = deque()

    def enter(self, flight: Flight) -> bytes:
        """A step was planned; returns the rows that wait for masks, for the plan."""
        arrays = self._running.rows
        sampled = flight.sampling_rows
        which = np.flatnonzero(arrays.guided[sampled])
        if not which.size:
            return b""
        rows = sampled[which]
        self._steps.append(
            _Step(flight.step, rows, flight.taken[rows], arrays.frontier[rows] - 1, arrays.owner[rows].tolist())
        )
        return pack(rows)

    def take(self) -> list[MasksDue]:
        """The steps that are ready. A step waits for those before it: they bring the tokens."""
        found: list[MasksDue] = []
        while self._steps:
            due = self._due(self._steps[0])
            if due is None:
                break
            self._steps.popleft()
            found.append(due)
        return found

    def drop(self, step: int) -> None:
        """The step's result is there: whatever it waited for is of no use."""
        while self._steps and self._steps[0].number <= step:
            self._steps.popleft()

    def clear(self) -> None:
        self._steps.clear()

    def _due(self, step: _Step) -> MasksDue | None:
        """None while a token is missing."""
        arrays = self._running.rows
        if not all_of(arrays.admission[step.rows] == step.admissions):
            return self._due_without_some(step)
        if not all_of(arrays.known[step.rows] >= step.lengths):
            return None
        last = arrays.tokens[step.rows, step.lengths - 1]
        return MasksDue(step.number, [*step.sequences], step.lengths.tolist(), last.tolist(), self._running)

    def _due_without_some(self, step: _Step) -> MasksDue | None:
        """The committed tokens of whoever was planned there count. One that was preempted meanwhile still gets its
        token; of one that has ended it is discarded."""
        admission, parked = self._running.rows.admission, self._running.parked
        sequences: list[Sequence | None] = []
        last: list[int] = []
        lengths: list[int] = step.lengths.tolist()
        places = zip(step.sequences, step.rows.tolist(), step.admissions.tolist(), lengths, strict=True)
        for sequence, row, number, length in places:
            wanted = admission[row] == number or parked.get(number) is sequence
            tokens = _tokens(self._running, sequence) if wanted else None
            if tokens is not None and tokens.size < length:
                return None
            sequences.append(sequence if wanted else None)
            last.append(0 if tokens is None else int(tokens[length - 1]))
        return MasksDue(step.number, sequences, lengths, last, self._running)


def _tokens(running: Running, sequence: Sequence) -> Int32:
    """The committed tokens of one that has a row, or was preempted."""
    if sequence.row == NO_ROW:
        return unpack(sequence.tokens)
    return running.rows.tokens[sequence.row, : running.rows.known[sequence.row]]
