"""Sequences that run: the one owner of rows and of blocks.

A sequence comes in by `admit`, which takes a row and blocks, and leaves by `stop` or `preempt`, which give both back.
Rows given back are named in the next plan before anything else of it, and ranks execute plans strictly in order, so a
row and its blocks are free at once, even while plans that still use them are in flight.
"""

from __future__ import annotations

import numpy as np

from treadle.kvcache import NO_BLOCKS, Blocks, Parent, PrefixCache, blocks_for_tokens
from treadle.transport.codec import pack
from treadle.transport.messages import Row, RowStart

from .config import CoreConfig
from .cost_model import CostModel
from .ledger import Ledger
from .policies.guard import Guard
from .request import NO_ROW, Sequence
from .reservation import Reservation
from .rows import NEVER, Rows, Rows1D
from .swapping import Swapping
from .tenant_tally import TenantTally


class Running:
    """rows: the arrays. cache: the blocks. parked: preempted sequences by admission whose tokens are still in flight.

    released: rows given back since the last plan. ledger: who was served what. tally: the same, for people.
    reservation: what is still to come. recomputed_tokens: K/V that had been there before a preemption or the engine's
    death. swapping: what of it moves to host memory and back. host_tokens: of prompts, served from there.
    """

    def __init__(self, config: CoreConfig, guard: Guard, costs: CostModel) -> None:
        self._config = config
        self._guard = guard
        self._block_size = config.block_size
        self._admissions = 0
        self.rows = Rows(config.max_num_seqs, config.max_blocks_per_row, config.block_size)
        self.cache = PrefixCache(config.num_blocks, config.block_size, config.swap_blocks)
        self.cache.writers = self
        self.swapping = Swapping(config, costs, self.cache)
        self.reservation = Reservation(config, self.rows, self.cache.pool)
        self.ledger = Ledger(self.rows, guard)
        self.tally = TenantTally(self.rows)
        self._stops = 0
        self._held: tuple[int, int] | None = None
        self.parked: dict[int, Sequence] = {}
        self.released: list[int] = []
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.recomputed_tokens = 0
        self.host_tokens = 0

    # ── in and out ───────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, sequence: Sequence) -> RowStart | None:
        """Takes a row and blocks for every known token; None, and nothing taken, when blocks are missing.

        Needs a free row. Some blocks stay spare, and those that running outputs are expected to need, or a new sequence
        would be admitted only to be preempted by the growth of the others (`reservation.py`). One that was held back
        for that is looked at again when somebody has stopped.
        """
        pool, spare = self.cache.pool, self.reservation.spare
        available = pool.available
        if (spare and available < sequence.wanted + spare) or self._held == (sequence.order, self._stops):
            return None
        hit, parent = self._lookup(sequence)
        away = self.cache.in_host(hit)
        here = hit[hit <= pool.total] if away else hit
        pool.share(here)
        missing = blocks_for_tokens(sequence.known, self._block_size) - here.size
        wanted = missing + available - pool.available
        if wanted + spare > available:
            sequence.wanted = wanted
            pool.release(here)
            return None
        if not self.reservation.allows(sequence, wanted):
            self._held = sequence.order, self._stops
            pool.release(here)
            return None
        if away:
            self._note_host_hit(sequence, away)
        table = self.cache.fetch(hit, missing - away) if away else self._extended(hit, missing)
        if table is None:
            raise RuntimeError("blocks that are available were not given")
        return self._start(sequence, table, hit.size * self._block_size, parent)

    def stop(self, sequence: Sequence) -> None:
        """The sequence has ended: its row and its references on blocks are given back."""
        row = sequence.row
        self._stops += 1
        self.ledger.leave(row)
        self.tally.leave(row)
        self.reservation.leave(row)
        self.cache.leave(self.rows.chain[row], row)
        self.cache.pool.release(self.rows.blocks_of(row))
        self.rows.vacate(row)
        self.released.append(row)
        sequence.row = NO_ROW
        sequence.request.running -= 1

    def preempt(self, sequence: Sequence) -> None:
        """Takes row and blocks away; the sequence keeps its committed tokens, and those in flight will still count."""
        self.cache.catch_up(self.rows.chain[sequence.row])
        self.swapping.preempt(self.rows.blocks_of(sequence.row))
        self._remember(sequence)
        sequence.in_flight = int(self.rows.frontier[sequence.row] - self.rows.known[sequence.row])
        if sequence.in_flight:
            self.parked[sequence.admission] = sequence
        self.stop(sequence)

    def forget(self) -> list[Sequence]:
        """The ranks are gone, and K/V with them: no rows, no blocks, nothing cached. Returns who was running."""
        sequences = self.sequences()
        for sequence in sequences:
            self._remember(sequence)
            self.stop(sequence)
        for sequence in self.parked.values():
            sequence.in_flight = 0
        self.parked.clear()
        self.released.clear()
        self.cache.clear()
        return sequences

    def note_length(self, sequence: Sequence) -> None:
        """Its output is complete; all of it is known."""
        self.reservation.lengths.note(sequence.request.tenant, self.length(sequence) - sequence.request.prompt_len)

    def length(self, sequence: Sequence) -> int:
        """Committed tokens, wherever it is."""
        return sequence.known if sequence.row == NO_ROW else int(self.rows.known[sequence.row])

    # ── while it runs ────────────────────────────────────────────────────────────────────────────────────────────────

    def sequences(self) -> list[Sequence]:
        return [sequence for sequence in self.rows.owner if sequence is not None]

    def last(self) -> Sequence:
        """Of those that run, the last in the policy's order: the one that gives way when blocks run out."""
        live = self.rows.admission.nonzero()[0]
        keys = self.rows.key[live]
        live = live[keys == keys.max()]
        sequence: Sequence = self.rows.owner[live[self.rows.order[live].argmax()]]
        return sequence

    def cached_tokens(self, sequence: Sequence) -> int:
        """Tokens that `admit` would find cached now."""
        return len(self._lookup(sequence)[0]) * self._block_size

    def grow(self, rows: Rows1D) -> Blocks:
        """Appends one block to each row's table; so many are available."""
        if not rows.size:
            return NO_BLOCKS
        blocks = self.cache.pool.allocate(rows.size)
        if blocks is None:
            raise RuntimeError("more blocks are asked for than are available")
        self.rows.append_blocks(rows, blocks)
        return blocks

    def publish_prefill(self, row: int, last: bool) -> None:
        """Publishes the blocks of known tokens that a step being planned will fill. last: it decodes from then on.

        They are not written yet. It is safe all the same: who finds them computes in this step or a later one. Ranks
        execute plans in order, so in a later one they are written. In this one the finder stands behind the writer
        in the plan's rows, and in each layer the K/V of all rows is written before any row attends.
        """
        rows, size = self.rows, self._block_size
        end = min(rows.known.item(row), rows.computed.item(row)) // size
        begin = rows.publish_at.item(row) // size - 1
        if end > begin:
            self._publish(row, *rows.contents(row, begin, end))
            rows.publish_at[row] = (end + 1) * size
        if last:
            rows.filled[row] = end * size
            self._follow(row)

    def publish_decoded(self, rows: Rows1D, at: Rows1D | slice) -> None:
        """Publishes the blocks that committed tokens have filled, but for those that the cache asks for when it needs
        them (`PrefixCache.follow`): nearly all rows follow a run from their first such block on.

        at: the rows, or their `span`.
        """
        arrays = self.rows
        filled = np.minimum(arrays.known[at], arrays.computed[at])
        arrays.filled[at] = filled
        due = filled >= arrays.publish_at[at]
        if due.item(due.argmax()):
            for row in rows[due].tolist():
                self._publish_due(row)

    def _publish_due(self, row: int) -> None:
        rows, size = self.rows, self._block_size
        last = rows.filled.item(row) // size
        self._publish(row, *rows.contents(row, rows.publish_at.item(row) // size - 1, last))
        rows.publish_at[row] = (last + 1) * size
        self._follow(row)

    def _publish(self, row: int, tokens: bytes, blocks: Blocks) -> None:
        """Blocks behind the row's place, which is behind them then."""
        old = self.rows.chain[row]
        self.rows.chain[row] = place = self.cache.publish(old, tokens, blocks)
        self.cache.leave(old, row)
        self.cache.join(place)

    def _follow(self, row: int) -> None:
        if self.cache.follow(self.rows.chain[row], row):
            self.rows.publish_at[row] = NEVER

    def filled(self, writer: int, first: int) -> tuple[bytes, Blocks]:
        """For the cache: what a row that follows a run has filled by the last commit."""
        return self.rows.contents(writer, first, self.rows.filled.item(writer) // self._block_size)

    def dismissed(self, writer: int, place: Parent) -> None:
        """By the cache: the row does not follow a run any more."""
        self.rows.chain[writer] = place
        self.rows.publish_at[writer] = (self.rows.filled.item(writer) // self._block_size + 1) * self._block_size

    def withdraw(self, row: int) -> None:
        """The row's work has failed, so nobody else is to be served what it computed."""
        self.cache.catch_up(self.rows.chain[row])
        self.cache.pool.withdraw(self.rows.blocks_of(row))

    def _lookup(self, sequence: Sequence) -> tuple[Blocks, Parent]:
        """Cached blocks for the sequence; at least its last token is left to compute, for there must be logits."""
        request = sequence.request
        wants_all = request.params.prompt_logprobs is not None and sequence.prompt_logprobs_to < request.prompt_len - 1
        if wants_all or not self._config.prefix_cache:
            return NO_BLOCKS, request.salt
        hit, parent = self.cache.match(request.salt, sequence.tokens, (sequence.known - 1) // self._block_size)
        if self.swapping.worth_fetching(hit):
            return hit, parent
        hit = self.cache.on_device(hit)
        return hit, self.cache.end_of(hit, request.salt)

    def _extended(self, hit: Blocks, missing: int) -> Blocks | None:
        """A block table of a hit that is on the device, and of blocks behind it."""
        fresh = self.cache.pool.allocate(missing)
        if fresh is None or not hit.size:
            return fresh
        table = np.empty(hit.size + missing, np.int64)  # twice as fast as `np.concatenate`
        table[: hit.size] = hit
        table[hit.size :] = fresh
        return table

    def _note_host_hit(self, sequence: Sequence, blocks: int) -> None:
        """Counts what a new prompt got from host memory."""
        if sequence.cached_tokens < 0:
            self.host_tokens += blocks * self._block_size

    def _start(self, sequence: Sequence, table: Blocks, computed: int, parent: Parent) -> RowStart:
        request = sequence.request
        self._admissions += 1
        row = self.rows.occupy(sequence, self._admissions, table, computed)
        if self._config.prefix_cache:
            self.rows.chain[row] = parent
            self.cache.join(parent)
            self.rows.publish_at[row] = computed + self._block_size
        self.ledger.enter(row, sequence.lane)
        self.tally.enter(row, request.tenant)
        self.reservation.enter(row, sequence)
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = min(computed, request.prompt_len)
            self.prompt_tokens += request.prompt_len
            self.cached_prompt_tokens += sequence.cached_tokens
            self.tally.prompt(row, request.prompt_len, sequence.cached_tokens)
            if self._guard.has_charge:
                self._guard.charge(sequence.lane, request.prompt_len - sequence.cached_tokens, 0)
        else:
            self.recomputed_tokens += sequence.known - computed
        if self._guard.has_admitted:
            self._guard.admitted(sequence.ticket)
        sequence.row, sequence.admission, sequence.wanted = Row(row), self._admissions, 0
        request.running += 1
        return RowStart(
            row,
            request.prompt_len,
            computed,
            sequence.tokens,
            pack(table),
            request.engine_params,
            sequence.seed,
            request.ban,
        )

    def _remember(self, sequence: Sequence) -> None:
        sequence.tokens = self.rows.tokens[sequence.row, : self.rows.known[sequence.row]].tobytes()
