"""The scheduling policy: what runs in the next step.

One idea: a sequence has tokens known and tokens computed, and each step the second catches up with the first under a
budget of tokens. Decodes come first (one token each, and a stream waits for it), then prompts that have begun, in
order, then new ones, in order, while rows, budget and blocks allow. Prefill, chunked prefill, decode, resumption
after a preemption and recovery after a crash are all the same thing.

Why it never deadlocks: `CoreConfig.capacity` lets any one sequence fit alone, only the youngest is ever preempted, and
so the oldest always gets its block. Why it never starves: order is fixed at arrival, nobody overtakes in the queue,
and a preempted sequence has its old place again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, StepPlan

from .config import CoreConfig
from .request import Request, Sequence
from .rows import Int64, Rows1D
from .running import Running
from .waiting import Waiting


@dataclass(slots=True, frozen=True)
class Flight:
    """A plan on its way: what is needed to understand its result.

    rows, admissions: of all rows of the step, in plan order. A row whose admission is another one by then has ended
    or was preempted meanwhile. sampling: indices of those that sample, None for all.
    """

    step: int
    rows: Rows1D
    admissions: Int64
    sampling: Rows1D | None

    def sampled(self) -> tuple[Rows1D, Int64]:
        """Rows and admissions in the order of the result's tokens."""
        if self.sampling is None:
            return self.rows, self.admissions
        return self.rows[self.sampling], self.admissions[self.sampling]


class _Batch:
    """A step while it is being put together."""

    def __init__(self, budget: int, decode: Rows1D) -> None:
        self.left = budget - decode.size
        self.decode = decode
        self.starts: list[RowStart] = []
        self.chunk_rows: list[int] = []
        self.chunk_counts: list[int] = []
        self.samples: list[int] = []

    def add_chunk(self, row: int, count: int, samples: bool) -> None:
        if samples:
            self.samples.append(self.decode.size + len(self.chunk_rows))
        self.chunk_rows.append(row)
        self.chunk_counts.append(count)
        self.left -= count

    def rows(self) -> Rows1D:
        return np.concatenate((self.decode, np.array(self.chunk_rows, np.intp))) if self.chunk_rows else self.decode

    def counts(self) -> bytes:
        return pack(self.chunk_counts) if self.chunk_counts else b""

    def sampling(self) -> Rows1D | None:
        if len(self.samples) == len(self.chunk_rows):
            return None
        return np.concatenate((np.arange(self.decode.size), np.array(self.samples, np.intp)))


class Planner:
    """Composes steps from what runs and what waits. trial: see `_admit`."""

    def __init__(self, config: CoreConfig, running: Running, waiting: Waiting) -> None:
        self._budget = config.max_num_batched_tokens
        self._chunk = config.max_prefill_chunk or config.max_num_batched_tokens
        self._block_size = config.block_size
        self._running = running
        self._waiting = waiting
        self._ones = pack(np.ones(config.max_num_seqs, np.int32))
        self.trial: Request | None = None
        self.preemptions = 0

    def compose(self, step: int) -> tuple[StepPlan, Flight] | None:
        """The next step, already entered into the rows as planned; None when nothing can run.

        Rows that were released stay on the list for the plan that can carry them.
        """
        preemptions = self.preemptions
        decode, growing = self._decode()
        blocks = self._running.grow(growing)
        self._running.rows.advance(decode)
        batch = _Batch(self._budget, decode)
        self._continue_prefills(batch)
        if preemptions == self.preemptions:
            self._admit(batch)
        rows = batch.rows()
        if not rows.size:
            return None
        plan = StepPlan(
            step,
            pack(self._running.released) if self._running.released else b"",
            batch.starts,
            pack(growing) if growing.size else b"",
            pack(blocks) if growing.size else b"",
            pack(rows),
            self._ones[: 4 * decode.size] + batch.counts(),
        )
        self._running.released.clear()
        return plan, Flight(step, rows, self._running.rows.admission[rows], batch.sampling())

    def _decode(self) -> tuple[Rows1D, Rows1D]:
        """Rows that compute one token and sample the next, and those among them that need one more block for it.

        They always fit the budget: `_admit` adds a row only in a step that has a token for every row and one more.
        """
        rows = self._running.rows
        ready = (rows.frontier - rows.computed == 1) & (rows.frontier < rows.limit)
        decode = ready.nonzero()[0]
        if not decode.size:
            return decode, decode
        growing = decode[rows.computed[decode] == rows.nblocks[decode] * self._block_size]
        while growing.size > self._running.cache.pool.available:
            victim = self._running.youngest()
            decode, growing = decode[decode != victim.row], growing[growing != victim.row]
            self._preempt(victim)
        return decode, growing

    def _preempt(self, victim: Sequence) -> None:
        self._running.preempt(victim)
        self._waiting.push(victim)
        self.preemptions += 1

    def _continue_prefills(self, batch: _Batch) -> None:
        rows = self._running.rows
        prefills = (rows.frontier - rows.computed > 1).nonzero()[0]
        for row in prefills[rows.order[prefills].argsort()].tolist() if prefills.size else ():
            if not batch.left:
                return
            self._advance(row, batch)

    def _admit(self, batch: _Batch) -> None:
        """New sequences, strictly in order: whoever cannot start keeps all behind it waiting.

        One with tokens still in flight has to see them first. Requests that were in flight when the engine died are
        suspects until they bring a token again; no more than one of them is on trial at a time, so that the one that
        kills the engine is found alone.
        """
        while batch.left and self._running.rows.free:
            sequence = self._waiting.first()
            if sequence is None or sequence.in_flight or not self._may_stand_trial(sequence.request):
                return
            start = self._running.admit(sequence)
            if start is None:
                return
            self._waiting.remove(sequence)
            batch.starts.append(start)
            self._advance(start.row, batch)

    def _may_stand_trial(self, request: Request) -> bool:
        if not request.failures:
            return True
        trial = self.trial
        if trial is not None and trial is not request and trial.failures and trial.running:
            return False
        self.trial = request
        return True

    def _advance(self, row: int, batch: _Batch) -> None:
        """Plans the row's next chunk; when that reaches the last known token, the row samples."""
        rows = self._running.rows
        count = min(int(rows.frontier[row] - rows.computed[row]), batch.left, self._chunk)
        rows.computed[row] += count
        samples = bool(rows.computed[row] == rows.frontier[row])
        if samples:
            rows.frontier[row] += 1
        batch.add_chunk(row, count, samples)
        self._running.publish_prefill(row)
