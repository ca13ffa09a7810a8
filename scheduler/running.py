"""Sequences that run: the one owner of rows and of blocks.

A sequence comes in by `admit`, which takes a row and blocks, and leaves by `stop` or `preempt`, which give both back.
Rows given back are named in the next plan before anything else of it, and ranks execute plans strictly in order, so a
row and its blocks are free at once, even while plans that still use them are in flight.
"""

from __future__ import annotations

from treadle.kvcache import NO_BLOCKS, Blocks, Parent, PrefixCache, blocks_for_tokens
from treadle.kvcache.arrays import any_of
from treadle.transport.codec import pack
from treadle.transport.messages import Row, RowStart

from .config import CoreConfig
from .cost_model import CostModel
from .ledger import Ledger
from .policies.guard import Guard
from .request import NO_ROW, Request, Sequence
from .reservation import Reservation
from .rows import NEVER, Rows, Rows1D
from .swapping import Swapping
from .tenant_tally import TenantTally


class Running:
    """rows: the arrays. cache: the blocks. parked: preempted sequences by admission whose tokens are still in flight.

    released: rows given back since the last plan. ledger: who was served what. tally: the same, for people.
    stops: how many rows were given back. reservation: what is still to come. recomputed_tokens: K/V that had been there
    before a preemption or the engine's death. swapping: what of it moves to host memory and back. host_tokens: of
    prompts, served from there.
    """

    def __init__(self, config: CoreConfig, guard: Guard, costs: CostModel) -> None:
        self._config = config
        self._guard = guard
        self._block_size = config.block_size
        self._prefix_cache = config.prefix_cache
        self._admissions = 0
        self.rows = Rows(config.max_num_seqs, config.max_blocks_per_row, config.block_size)
        self.cache = PrefixCache(config.num_blocks, config.block_size, config.swap_blocks, config.evicted_at_once)
        self.cache.writers = self
        self.swapping = Swapping(config, costs, self.cache)
        self.reservation = Reservation(config, self.rows, self.cache.pool)
        self.ledger = Ledger(self.rows, guard)
        self.tally = TenantTally(self.rows)
        self.stops = 0
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
        if (spare and available < sequence.wanted + spare) or self._held == (sequence.order, self.stops):
            return None
        known = sequence.known
        hit, parent = self._lookup(sequence)
        away = self.cache.in_host(hit) if hit.size else 0
        here = hit[hit <= pool.total] if away else hit
        missing = wanted = blocks_for_tokens(known, self._block_size) - here.size
        if here.size:
            pool.share(here)
            wanted += available - pool.available
        if wanted + spare > available:
            sequence.wanted = wanted
            pool.release(here)
            return None
        if not self.reservation.allows(sequence, known, wanted):
            self._held = sequence.order, self.stops
            pool.release(here)
            return None
        if away:
            self._note_host_hit(sequence, away)
        computed = hit.size * self._block_size
        if away:
            fresh, hit = self.cache.fetch(hit, missing - away), NO_BLOCKS
        else:
            fresh = pool.allocate(missing)
        if fresh is None:
            raise RuntimeError("blocks that are available were not given")
        return self._start(sequence, known, hit, fresh, computed, parent)

    def stop(self, sequence: Sequence) -> None:
        """The sequence has ended: its row and its references on blocks are given back."""
        row, rows = sequence.row, self.rows
        self.stops += 1
        self.ledger.leave(row)
        self.tally.leave(row)
        self.reservation.leave(row)
        self.cache.leave(rows.chain[row], row)
        self.cache.pool.release(rows.blocks_of(row))
        rows.vacate(row)
        self.released.append(row)
        sequence.row = NO_ROW
        sequence.request.running -= 1

    def preempt(self, sequence: Sequence) -> None:
        """Takes row and blocks away; the sequence keeps its committed tokens, and those in flight will still count."""
        self.cache.catch_up(self.rows.chain[sequence.row])
        self.swapping.preempt(self.rows.blocks_of(sequence.row))
        self._remember(sequence)
        sequence.in_flight = self.rows.frontier_of[sequence.row] - self.rows.known_of[sequence.row]
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

    def note_length(self, request: Request, length: int) -> None:
        """One of its outputs is complete; length: with the prompt."""
        self.reservation.lengths.note(request.tenant, length - request.prompt_len)

    def length(self, sequence: Sequence) -> int:
        """Committed tokens, wherever it is."""
        return sequence.known if sequence.row == NO_ROW else self.rows.known_of[sequence.row]

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
        self._publish_filled(row)
        if last:
            self._follow(row)

    def publish_decoded(self, rows: Rows1D, at: Rows1D | slice) -> None:
        """Publishes the blocks that committed tokens have filled, but for those that the cache asks for when it needs
        them (`PrefixCache.follow`): nearly all rows follow a run from their first such block on.

        at: the rows, or their `span`.
        """
        due = self.rows.known >= self.rows.publish_at
        if any_of(due):
            for row in rows[due[at]].tolist():
                if self._publish_filled(row):  # else the K/V of its newest token is not planned yet
                    self._follow(row)

    def _publish_filled(self, row: int) -> bool:
        """Publishes what the row has filled and not published; whether there was a block."""
        rows, size = self.rows, self._block_size
        begin, end = rows.publish_at_of[row] // size - 1, rows.filled(row) // size
        if end <= begin:
            return False
        self._publish(row, *rows.contents(row, begin, end))
        rows.publish_at_of[row] = (end + 1) * size
        return True

    def _publish(self, row: int, tokens: bytes, blocks: Blocks) -> None:
        """Blocks behind the row's place, which is behind them then."""
        chain, cache = self.rows.chain, self.cache
        old = chain[row]
        chain[row] = place = cache.publish(old, tokens, blocks)
        cache.leave(old, row)
        cache.join(place)

    def _follow(self, row: int) -> None:
        if self.cache.follow(self.rows.chain[row], row):
            self.rows.publish_at_of[row] = NEVER

    def filled(self, writer: int, first: int) -> tuple[bytes, Blocks]:
        """For the cache: what a row that follows a run has filled."""
        return self.rows.contents(writer, first, self.rows.filled(writer) // self._block_size)

    def dismissed(self, writer: int, place: Parent) -> None:
        """By the cache: the row does not follow a run any more."""
        self.rows.chain[writer] = place
        self.rows.publish_at_of[writer] = (self.rows.filled(writer) // self._block_size + 1) * self._block_size

    def withdraw(self, row: int) -> None:
        """The row's work has failed, so nobody else is to be served what it computed."""
        self.cache.catch_up(self.rows.chain[row])
        self.cache.pool.withdraw(self.rows.blocks_of(row))

    def _lookup(self, sequence: Sequence) -> tuple[Blocks, Parent]:
        """Cached blocks for the sequence; at least its last token is left to compute, for there must be logits."""
        request = sequence.request
        wants_all = request.params.prompt_logprobs is not None and sequence.prompt_logprobs_to < request.prompt_len - 1
        if wants_all or not self._prefix_cache:
            return NO_BLOCKS, request.salt
        hit, parent = self.cache.match(request.salt, sequence.tokens, (sequence.known - 1) // self._block_size)
        if not hit.size or self.swapping.worth_fetching(hit):
            return hit, parent
        hit = self.cache.on_device(hit)
        return hit, self.cache.end_of(hit, request.salt)

    def _note_host_hit(self, sequence: Sequence, blocks: int) -> None:
        """Counts what a new prompt got from host memory."""
        if sequence.cached_tokens < 0:
            self.host_tokens += blocks * self._block_size

    def _start(
        self, sequence: Sequence, known: int, hit: Blocks, fresh: Blocks, computed: int, parent: Parent
    ) -> RowStart:
        """hit, fresh: its block table."""
        request, rows = sequence.request, self.rows
        prompt_len = request.prompt_len
        self._admissions += 1
        row = rows.occupy(sequence, self._admissions, hit, fresh, computed)
        if self._prefix_cache:
            rows.chain[row] = parent
            self.cache.join(parent)
            rows.publish_at_of[row] = computed + self._block_size
        self.ledger.enter(row, sequence.lane)
        self.tally.enter(row, request.tenant, known)
        self.reservation.enter(row, request)
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = cached = min(computed, prompt_len)
            self.prompt_tokens += prompt_len
            self.cached_prompt_tokens += cached
            self.tally.prompt(row, prompt_len, cached)
            if self._guard.has_charge:
                self._guard.charge(sequence.lane, prompt_len - cached, 0)
        else:
            self.recomputed_tokens += known - computed
        if self._guard.has_admitted:
            self._guard.admitted(sequence.ticket)
        sequence.row, sequence.admission, sequence.wanted = Row(row), self._admissions, 0
        request.running += 1
        table = pack(rows.blocks_of(row))
        params = request.engine_params if request.guided else request.params
        return RowStart(row, prompt_len, computed, sequence.tokens, table, params, sequence.seed, request.ban)

    def _remember(self, sequence: Sequence) -> None:
        sequence.tokens = self.rows.tokens[sequence.row, : self.rows.known[sequence.row]].tobytes()
