"""The scheduling policy: what runs in the next step.

One idea: a sequence has tokens known and tokens computed, and each step the second catches up with the first under a
budget of tokens. Decodes come first (one token each, and a stream waits for it), then prompts that have begun, in
order, then new ones, in order, while rows, budget and blocks allow. Prefill, chunked prefill, decode, resumption
after a preemption and recovery after a crash are all the same thing. Which order it is, who gives way when blocks run
out and how much of a step prompts get is the policy's to say (`policies/interface.py`); it is asked where rows change.

Why it never deadlocks: `CoreConfig.capacity` lets any one sequence fit alone. Blocks are taken away only for a row that
decodes, and whoever is admitted has samples at least once before it needs a further block. So between two preemptions
of a sequence it or another has got a token, whoever the policy chooses to give way, and tokens are never taken back.
Why nobody starves is the policy's promise: each says its bound.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.kvcache import HostTier
from treadle.kvcache.arrays import constant
from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, StepPlan

from .config import CoreConfig
from .cost_model import CostModel, StepShape, chunk_pairs
from .flight import Flight
from .pace import Pace
from .policies.guard import Guard
from .request import NO_ROW, Request, Sequence
from .rows import ONE, Int64, Rows1D, span
from .running import Running
from .trials import Trials
from .waiting import Waiting

_COUNT: Final = np.dtype(np.int64)
_NO_ROWS: Final[Rows1D] = np.zeros(0, np.intp)
_NO_NEEDS: Final[Int64] = np.zeros(0, np.int64)


class _Batch:
    """A step while it is being put together. sampled: of each row that there is, tokens that the step samples."""

    def __init__(self, budget: int, decode: Rows1D, sampled: Int64, context: int, host: HostTier) -> None:
        self._host = host
        self.sampled = sampled
        self.decode = decode
        self.decodes = decode.size
        self.at = span(decode) if self.decodes else decode
        self.left = budget - self.decodes
        self._context = context
        self._pairs = 0
        self._chunk_tokens = 0
        self.starts: list[RowStart] = []
        self.chunk_rows: list[int] = []
        self.chunk_counts: list[int] = []
        self.samples: list[int] = []

    def add_chunk(self, row: int, count: int, end: int, samples: bool) -> None:
        if samples:
            self.samples.append(self.decodes + len(self.chunk_rows))
            self.sampled[row] = 1
        self.chunk_rows.append(row)
        self.chunk_counts.append(count)
        self.left -= count
        self._chunk_tokens += count
        self._pairs += chunk_pairs(count, end)

    def shape(self) -> StepShape:
        copies = self._host.pending if self._host.total else ()
        return StepShape(self._chunk_tokens, self.decodes, self._context, self._pairs, *copies)

    def rows(self) -> Rows1D:
        if not self.chunk_rows:
            return self.decode
        decodes = self.decodes
        if not decodes:
            return np.array(self.chunk_rows, np.intp)
        rows = np.empty(decodes + len(self.chunk_rows), np.intp)  # twice as fast as `np.concatenate`
        rows[:decodes] = self.decode
        rows[decodes:] = self.chunk_rows
        return rows

    def packed_rows(self, numbers: bytes) -> bytes:
        """`rows()` for the wire. numbers: those of all rows that there are, packed: slicing takes no time."""
        if not self.decodes:
            return pack(self.chunk_rows)
        at = self.at
        decode = numbers[4 * at.start : 4 * at.stop] if isinstance(at, slice) else pack(at)
        return decode + pack(self.chunk_rows) if self.chunk_rows else decode

    def counts(self) -> bytes:
        return pack(self.chunk_counts) if self.chunk_counts else b""

    def sampling(self) -> Rows1D | None:
        if len(self.samples) == len(self.chunk_rows):
            return None
        return np.concatenate((np.arange(self.decodes), np.array(self.samples, np.intp)))


class Planner:
    """Composes steps from what runs and what waits. trials: of requests under which an engine died."""

    def __init__(self, config: CoreConfig, running: Running, waiting: Waiting, guard: Guard, costs: CostModel) -> None:
        self._budget = config.max_num_batched_tokens
        self._chunk = config.max_prefill_chunk or config.max_num_batched_tokens
        self._size_array = constant(config.block_size)
        self._running = running
        self._host = running.cache.host
        self._waiting = waiting
        self._guard = guard
        self._pace = Pace(config.target_tpot, costs, config.block_size)
        self._ones = pack(np.ones(config.max_num_seqs, np.int32))
        self._numbers = pack(np.arange(config.max_num_seqs))
        self.trials = Trials()
        self.preemptions = 0
        self.blocked: Sequence | None = None

    @property
    def room(self) -> int:
        """Rows for those who wait: the free ones, as far as there is a block for each, or none where a row is not what
        the first of them waits for (`blocked`)."""
        first = self.blocked
        if first is not None and first.row == NO_ROW and not first.finish:
            return 0
        running = self._running
        free = len(running.rows.free)
        return min(free, max(0, running.cache.pool.available - running.reservation.spare)) if free else 0

    def compose(self, step: int, now: float) -> tuple[StepPlan, Flight] | None:
        """The next step, already entered into the rows as planned; None when nothing can run.

        Rows that were released stay on the list for the plan that can carry them.
        """
        preemptions, self.blocked = self.preemptions, None
        self._guard.broken = False
        running = self._running
        running.swapping.begin()
        arrays = running.rows
        needs = arrays.frontier - arrays.computed if arrays.count else _NO_NEEDS
        if needs.size:
            decoding, growing = self._decode(needs, now)
            decode, sampled = decoding.nonzero()[0], decoding.astype(_COUNT)
        else:
            decode, sampled, growing = _NO_ROWS, np.zeros(arrays.known.size, _COUNT), _NO_ROWS
        blocks = running.grow(growing)
        context = arrays.advance(sampled) if decode.size else 0
        batch = _Batch(self._budget, decode, sampled, context, self._host)
        preempted = preemptions != self.preemptions
        if preempted:
            needs = arrays.frontier - arrays.computed
        prefills = (needs > ONE).nonzero()[0] if needs.size and needs.item(needs.argmax()) > 1 else _NO_ROWS
        admits = bool(arrays.free) and not preempted and self._waiting.count > 0
        if prefills.size or admits:
            self._limit(batch, now)
            if prefills.size:
                self._continue_prefills(batch, prefills)
            if admits:
                self._admit(batch, now)
        rows = batch.rows()
        if not rows.size:
            return None
        plan = StepPlan(
            step,
            pack(running.released) if running.released else b"",
            batch.starts,
            pack(growing) if growing.size else b"",
            pack(blocks) if growing.size else b"",
            batch.packed_rows(self._numbers),
            self._ones[: 4 * batch.decodes] + batch.counts(),
        )
        running.released.clear()
        at = rows if batch.chunk_rows else batch.at
        taken = arrays.admission.copy()
        flight = Flight(step, rows, at, taken, running.stops, batch.sampling(), sampled, batch.shape())
        return (self._with_copies(plan) if self._host.total else plan), flight

    def _with_copies(self, plan: StepPlan) -> StepPlan:
        """The plan, with what it moves between device and host memory."""
        out, back = self._host.take_copies()
        return msgspec.structs.replace(plan, copy_out=pack(out), copy_in=pack(back)) if out or back else plan

    def _decode(self, needs: Int64, now: float) -> tuple[npt.NDArray[np.bool_], Rows1D]:
        """Of each row whether it computes one token and samples the next, and the rows that need one more block for
        it. needs: of each row, tokens that it needs computed.

        They always fit the budget: `_admit` adds a row only in a step that has a token for every row and one more.
        """
        rows = self._running.rows
        decoding = (needs == ONE) & (rows.frontier < rows.limit)
        growing = (decoding & (rows.computed == rows.nblocks * self._size_array)).nonzero()[0]
        while growing.size > self._running.cache.pool.available:
            victim = self._victim(now)
            decoding[victim.row] = False
            growing = growing[growing != victim.row]
            self._preempt(victim)
        return decoding, growing

    def _victim(self, now: float) -> Sequence:
        """Whom the policy names; by default, and when it fails, the last in its order."""
        if not self._guard.has_victim or self._guard.broken:
            return self._running.last()
        sequences = self._running.sequences()
        named = self._guard.victim(tuple(s.ticket for s in sequences), self._waiting.view(now))
        return next((s for s in sequences if s.ticket is named), None) or self._running.last()

    def _limit(self, batch: _Batch, now: float) -> None:
        """What the policy leaves of the budget to prompts."""
        if self._guard.has_budget and batch.left and not self._guard.broken:
            left = self._guard.budget(batch.shape(), batch.left, self._waiting.view(now))
            batch.left = batch.left if left is None else left

    def _room(self, batch: _Batch, start: int) -> int:
        """Tokens of a chunk that begins at this position, under the budget and the service level."""
        if not (self._pace.bounds and batch.decodes and batch.left):
            return batch.left
        return min(batch.left, self._pace.room(batch.shape(), start))

    def _preempt(self, victim: Sequence) -> None:
        self._running.preempt(victim)
        self._waiting.push(victim)
        self.preemptions += 1
        self.blocked = victim

    def _continue_prefills(self, batch: _Batch, prefills: Rows1D) -> None:
        rows = self._running.rows
        in_order = np.lexsort((rows.order[prefills], rows.key[prefills]))
        for row in prefills[in_order].tolist():
            room = self._room(batch, rows.computed_of[row])
            if not room:
                return
            self._advance(row, batch, room)

    def _admit(self, batch: _Batch, now: float) -> None:
        """New sequences, strictly in order: whoever cannot start keeps all behind it waiting.

        One with tokens still in flight has to see them first. Of those under which an engine died, one at a time
        begins, and who is accused of it before everybody and alone (`trials.py`).
        """
        running, waiting = self._running, self._waiting
        running.ledger.settle()
        running.reservation.begin()
        accused = self.trials.accused()
        if accused is not None:
            self._try_alone(accused, batch)
            self.blocked = next((s for s in accused.sequences if s.row == NO_ROW and not s.finish), None)
            return
        while running.rows.free and self._room(batch, 0):
            sequence = waiting.first(now)
            if sequence is None:
                return
            begins = not sequence.in_flight and self.trials.may_begin(sequence.request)
            if not (begins and self._start(sequence, batch)):
                self.blocked = sequence
                return
        if running.rows.free and waiting.count:  # the budget of this step is used up
            self.blocked = waiting.earliest(1)[0]

    def _start(self, sequence: Sequence, batch: _Batch) -> bool:
        """Whether there are blocks for it."""
        start = self._running.admit(sequence)
        if start is None:
            return False
        self._waiting.remove(sequence)
        batch.starts.append(start)
        room = max(1, self._room(batch, start.computed))  # it has a row, so it is to do something
        self._advance(start.row, batch, room)
        return True

    def _try_alone(self, accused: Request, batch: _Batch) -> None:
        for sequence in accused.sequences:
            waits = sequence.row == NO_ROW and not sequence.finish and not sequence.in_flight
            room = bool(self._running.rows.free) and self._room(batch, 0) > 0
            if waits and not (room and self._start(sequence, batch)):
                return

    def _advance(self, row: int, batch: _Batch, room: int) -> None:
        """Plans the row's next chunk; when that reaches the last known token, the row samples."""
        rows = self._running.rows
        computed, frontier = rows.computed_of[row], rows.frontier_of[row]
        count = min(frontier - computed, room, self._chunk)
        end = computed + count
        rows.computed_of[row] = end
        samples = end == frontier
        if samples:
            rows.frontier_of[row] = frontier + 1
        batch.add_chunk(row, count, end, samples)
        self._running.publish_prefill(row, samples)
