"""Which blocks are worth a copy in host memory, and which copies are worth fetching.

    recompute(s, e) = prefill_token · (e − s) + chunk_pair · pairs(s, e)    to prefill positions s to e
    swap(n)         = (block_out + block_in) · n                            to move n blocks out and back

The first is learned from the steps; the second begins with what the ranks measured when they were loaded, and is
learned too (`cost_model.py`). While nothing is known of prefills, swapping is taken to be cheaper: it loses no work.

Nothing is copied when a sequence is preempted. Its blocks become cached, as those of one that has ended, and a block is
copied out by the plan that gives it to somebody else. So what is never needed by others is never moved.
"""

from __future__ import annotations

from treadle.kvcache import Blocks, PrefixCache

from .config import CoreConfig
from .cost_model import CostModel, chunk_pairs


class Swapping:
    """Decides for one core. swapped: victims of preemption whose blocks were kept for host memory."""

    def __init__(self, config: CoreConfig, costs: CostModel, cache: PrefixCache) -> None:
        self.swapped = 0
        self._on = config.swap_blocks > 0 and config.preemption != "recompute"
        self._always = config.preemption == "swap"
        self._size = config.block_size
        self._costs = costs
        self._cache = cache
        self._cache.saving = self._on and self._always

    def begin(self) -> None:
        """Before a plan: whether cached blocks that it evicts move to host memory.

        Where a block stood in its sequence is not known any more, so it is compared at the beginning of one, where
        computing is cheapest.
        """
        if self._on and not self._always:
            self._cache.saving = self._cheaper(1, 1, 0, self._size)

    def preempt(self, blocks: Blocks) -> None:
        """A sequence gives way, whose block table this is: swapped out, or to be computed again?

        Compared is what it alone holds, which stands behind what it shares with others.
        """
        if not self._on:
            return
        pool = self._cache.pool
        own = ((pool.refs[blocks] == 1) & pool.published[blocks]).nonzero()[0]
        if not own.size:
            return
        start, end = own.item(0) * self._size, (own.item(-1) + 1) * self._size
        if self._cheaper(own.size, own.size, start, end):
            self.swapped += 1
            self._cache.want(blocks[own])

    def worth_fetching(self, hit: Blocks) -> bool:
        """Whether the part of a hit that is in host memory is fetched; else it is computed again."""
        if not self._on:
            return True
        away = self._cache.in_host(hit)
        end = len(hit) * self._size
        return self._always or not away or self._cheaper(0, away, end - away * self._size, end)

    def _cheaper(self, out: int, back: int, start: int, end: int) -> bool:
        """Copying so many blocks takes less time than a prefill of these positions."""
        costs = self._costs.coefficients
        again = costs.prefill_token * (end - start) + costs.chunk_pair * chunk_pairs(end - start, end)
        return not again or costs.block_out * out + costs.block_in * back < again
