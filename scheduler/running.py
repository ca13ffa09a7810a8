"""Sequences that run: the one owner of rows and of blocks.

A sequence comes in by `admit`, which takes a row and blocks, and leaves by `stop` or `preempt`, which give both back.
Rows given back are named in the next plan before anything else of it, and ranks execute plans strictly in order, so a
row and its blocks are free at once, even while plans that still use them are in flight.
"""

from __future__ import annotations

import numpy as np

from treadle.kvcache import BlockId, Parent, PrefixCache, blocks_for_tokens
from treadle.transport.codec import Int32
from treadle.transport.messages import Row, RowStart

from .config import CoreConfig
from .request import NO_ROW, Sequence
from .rows import WIRE_INT, Rows, Rows1D


class Running:
    """rows: the arrays. cache: the blocks. parked: preempted sequences by admission whose tokens are still in flight.

    released: rows given back since the last plan.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._block_size = config.block_size
        self._admissions = 0
        self._last_block = np.arange(-config.block_size, 0, dtype=np.intp)
        self.rows = Rows(config.max_num_seqs, config.max_model_len, config.max_blocks_per_row)
        self.cache = PrefixCache(config.num_blocks, config.block_size)
        self.parked: dict[int, Sequence] = {}
        self.released: list[int] = []
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0

    # ── in and out ───────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, sequence: Sequence) -> RowStart | None:
        """Takes a row and blocks for every known token; None, and nothing taken, when blocks are missing.

        Needs a free row. Every row that runs keeps one spare block in the pool, or a new sequence would be admitted
        only to be preempted by the growth of the others in the next steps.
        """
        pool, running = self.cache.pool, self.rows.count
        if running and pool.available < sequence.wanted + running:
            return None
        available = pool.available
        hit, parent = self._lookup(sequence)
        pool.share(hit)
        missing = blocks_for_tokens(sequence.known, self._block_size) - len(hit)
        fresh = pool.allocate(missing) if pool.available >= missing + running else None
        if fresh is None:
            sequence.wanted = missing + available - pool.available
            pool.release(hit)
            return None
        return self._start(sequence, hit + fresh, len(hit) * self._block_size, parent)

    def stop(self, sequence: Sequence) -> None:
        """The sequence has ended: its row and its references on blocks are given back."""
        row = sequence.row
        self.cache.pool.release(self.rows.blocks_of(row))
        self.rows.vacate(row)
        self.released.append(row)
        sequence.row = NO_ROW
        sequence.request.running -= 1

    def preempt(self, sequence: Sequence) -> None:
        """Takes row and blocks away; the sequence keeps its committed tokens, and those in flight will still count."""
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

    # ── while it runs ────────────────────────────────────────────────────────────────────────────────────────────────

    def sequences(self) -> list[Sequence]:
        return [sequence for sequence in self.rows.owner if sequence is not None]

    def youngest(self) -> Sequence:
        """The one that gives way when blocks run out."""
        sequence: Sequence = self.rows.owner[self.rows.order.argmax()]
        return sequence

    def grow(self, rows: Rows1D) -> Int32:
        """Appends one block to each row's table; so many are available."""
        blocks = np.array(self.cache.pool.allocate(rows.size) or [], WIRE_INT)
        if blocks.size:
            self.rows.append_blocks(rows, blocks)
        return blocks

    def publish_prefill(self, row: int) -> None:
        """Publishes the blocks of known tokens that a step being planned will fill.

        They are not written yet. It is safe all the same: who finds them computes in this step or a later one. Ranks
        execute plans in order, so in a later one they are written. In this one the finder stands behind the writer
        in the plan's rows, and in each layer the K/V of all rows is written before any row attends.
        """
        rows, size = self.rows, self._block_size
        end = min(rows.known[row], rows.computed[row])
        start = rows.publish_at[row] - size
        if end - start < size:
            return
        end -= end % size
        tokens = rows.tokens[row, start:end].tobytes()
        blocks = rows.table[row, start // size : end // size].tolist()
        rows.chain[row] = self.cache.publish(rows.chain[row], tokens, blocks)
        rows.publish_at[row] = end + size

    def publish_decoded(self, rows: Rows1D) -> None:
        """Publishes the blocks that committed tokens have filled. With blocks of one token, two can be due at once."""
        while (rows := self._due(rows)).size:
            ends = self.rows.publish_at[rows]
            tokens = self.rows.tokens[rows[:, None], ends[:, None] + self._last_block].tobytes()
            blocks = self.rows.table[rows, ends // self._block_size - 1].tolist()
            self.rows.publish_at[rows] = ends + self._block_size
            chain, numbers = self.rows.chain, rows.tolist()
            parents = self.cache.publish_each([chain[row] for row in numbers], tokens, blocks)
            for row, parent in zip(numbers, parents, strict=True):
                chain[row] = parent

    def withdraw(self, row: int) -> None:
        """The row's work has failed, so nobody else is to be served what it computed."""
        for block in self.rows.blocks_of(row):
            self.cache.pool.withdraw(block)

    def _due(self, rows: Rows1D) -> Rows1D:
        filled = np.minimum(self.rows.known[rows], self.rows.computed[rows])
        return rows[filled >= self.rows.publish_at[rows]]

    def _lookup(self, sequence: Sequence) -> tuple[list[BlockId], Parent]:
        """Cached blocks for the sequence; at least its last token is left to compute, for there must be logits."""
        request = sequence.request
        wants_all = request.params.prompt_logprobs is not None and sequence.prompt_logprobs_to < request.prompt_len - 1
        if wants_all or not self._config.prefix_cache:
            return [], request.salt
        return self.cache.match(request.salt, sequence.tokens, (sequence.known - 1) // self._block_size)

    def _start(self, sequence: Sequence, blocks: list[BlockId], computed: int, parent: Parent) -> RowStart:
        request = sequence.request
        self._admissions += 1
        table = np.array(blocks, WIRE_INT)
        row = self.rows.occupy(sequence, self._admissions, table, computed)
        if self._config.prefix_cache:
            self.rows.chain[row] = parent
            self.rows.publish_at[row] = computed + self._block_size
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = min(computed, request.prompt_len)
            self.prompt_tokens += request.prompt_len
            self.cached_prompt_tokens += sequence.cached_tokens
        sequence.row, sequence.admission, sequence.wanted = Row(row), self._admissions, 0
        request.running += 1
        return RowStart(
            row,
            request.prompt_len,
            computed,
            sequence.tokens,
            table.tobytes(),
            request.engine_params,
            sequence.seed,
            request.ban,
        )

    def _remember(self, sequence: Sequence) -> None:
        sequence.tokens = self.rows.tokens[sequence.row, : self.rows.known[sequence.row]].tobytes()
