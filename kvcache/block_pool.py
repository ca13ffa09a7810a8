"""Who holds which block of key/value cache. Every operation is O(1) per block."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import NewType

from .invariant import require

BlockId = NewType("BlockId", int)
Label = bytes | tuple[str, bytes]
"""The tokens of a block; of the first of a sequence, with its salt."""

_SLACK = 64


class BlockPool:
    """Blocks with reference counts. A block is always in exactly one of three places:

    - blank: in `_blank`, content worthless;
    - cached: unreferenced but labelled, so somebody may want its content again; evicted least recently used first, and
      only when no blank block is left;
    - owned: `refs` says by how many block tables.

    `_queue` is the order of eviction: what became cached by one release, last first, with its number. `_released`
    says of each block in which release it became cached last; where it is named in an earlier one, or has an owner,
    it is stepped over. So sharing a prefix, which is the hot path, only counts references, and nothing is ever taken
    out of the middle. `_named` counts the names in the queue.

    Block 0 is the null block: a padding row of an engine writes there. It is never handed out, so `total` is
    `num_blocks - 1`. `on_evict` is told the blocks whose content is given up, while they still have their labels;
    `on_withdraw` those whose content is wrong, by default the same. `cached` counts the cached ones.
    """

    def __init__(
        self,
        num_blocks: int,
        on_evict: Callable[[Sequence[BlockId]], object],
        on_withdraw: Callable[[Sequence[BlockId]], object] | None = None,
    ) -> None:
        self.total = num_blocks - 1
        self.evictions = 0
        self._on_evict = on_evict
        self._on_withdraw = on_withdraw or on_evict
        self.clear()

    def clear(self) -> None:
        """Every block is blank again: the memory behind the pool is gone. No block is reported as evicted."""
        self._blank = [BlockId(block) for block in range(self.total, 0, -1)]
        self._queue: deque[tuple[int, list[BlockId]]] = deque()
        self._released = [0] * (self.total + 1)
        self._release = self._named = 0
        self.cached = 0
        self.refs = [0] * (self.total + 1)
        self.labels: list[Label | None] = [None] * (self.total + 1)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._blank) + self.cached

    @property
    def used(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks, each with one reference that the caller now owns; None, and nothing taken, if too few."""
        missing = count - len(self._blank)
        if missing > self.cached:
            return None
        if missing > 0:
            self._evict(missing)
        if not count:
            return []
        taken = self._blank[: -count - 1 : -1]
        del self._blank[-count:]
        refs = self.refs
        for block in taken:
            refs[block] = 1
        return taken

    def share(self, blocks: Iterable[BlockId]) -> None:
        """One more reference on each, owned by the caller. The blocks are owned or cached, not blank."""
        refs, cached = self.refs, 0
        for block in blocks:
            count = refs[block]
            refs[block] = count + 1
            if not count:
                cached += 1
        self.cached -= cached

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Gives back one reference on each block of one block table, in the order of the table.

        They are freed from the tail, so that a continuation is evicted before the prefix it hangs on.
        """
        refs, labels, released, blank = self.refs, self.labels, self._released, self._blank
        number, cached = self._release + 1, list[BlockId]()
        for block in reversed(blocks):
            left = refs[block] - 1
            refs[block] = left
            if not left:
                if labels[block] is None:
                    blank.append(block)
                else:
                    cached.append(block)
                    released[block] = number
        if cached:
            self._release = number
            cached.reverse()
            self._enqueue(number, cached)

    def withdraw(self, block: BlockId) -> None:
        """Its content is not to be served again. Owners keep it; an idle block becomes blank."""
        if self.labels[block] is None:
            return
        self._on_withdraw([block])
        self.labels[block] = None
        self._released[block] = 0
        if not self.refs[block]:
            self.cached -= 1
            self._blank.append(block)

    def check(self) -> None:
        """Raises CoreInvariantError unless every block is in exactly one place and counted there."""
        owned = [block for block, count in enumerate(self.refs) if count]
        cached = [block for number, part in self._queue for block in self._idle(number, part)]
        places = Counter[int]([*self._blank, *cached, *owned])
        require(set(places) == set(range(1, self.total + 1)), "a block is lost, or the null block was handed out")
        twice = [block for block, count in places.items() if count > 1]
        require(not twice, f"blocks {twice} are in two places at once")
        require(min(self.refs) >= 0, "a block was released more often than owned")
        require(len(cached) == self.cached, "cached blocks are miscounted")
        require(all(self.labels[block] is None for block in self._blank), "a blank block has a label")
        require(all(self.labels[block] is not None for block in cached), "a cached block has no label")
        require(sum(len(part) for _, part in self._queue) == self._named, "names in the queue are miscounted")

    def _evict(self, count: int) -> None:
        blocks: list[BlockId] = []
        while (missing := count - len(blocks)) > 0:
            number, part = self._queue[0]
            named = part[: -missing - 1 : -1]
            del part[-missing:]
            if not part:
                self._queue.popleft()
            self._named -= len(named)
            blocks += self._idle(number, named)
        self._on_evict(blocks)
        labels = self.labels
        for block in blocks:
            labels[block] = None
        self._blank += blocks
        self.cached -= count
        self.evictions += count

    def _idle(self, number: int, part: list[BlockId]) -> list[BlockId]:
        """Those of a part of the queue that may be evicted."""
        refs, released = self.refs, self._released
        return [block for block in part if released[block] == number and not refs[block]]

    def _enqueue(self, number: int, cached: list[BlockId]) -> None:
        self.cached += len(cached)
        self._queue.append((number, cached))
        self._named += len(cached)
        if self._named > 2 * self.total + _SLACK:  # half of it is to be stepped over: O(1) for each that ever came in
            parts = [(number, self._idle(number, part)) for number, part in self._queue]
            self._queue = deque((number, part) for number, part in parts if part)
            self._named = self.cached
