"""Who holds which block of key/value cache. An operation on many blocks is a few vector operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, NewType

import numpy as np
import numpy.typing as npt

from .arrays import NO, all_of, constant
from .invariant import require

BlockId = NewType("BlockId", int)
Blocks = npt.NDArray[np.int64]
"""Numbers of blocks, in the order of a block table. As wide as an index, which is several times as fast as int32."""

_SLACK: Final = 64
_LOOK: Final = 64
_NOWHERE: Final = -1
_NONE: Final = constant(0)
_ONE: Final = constant(1)
_OUT: Final = constant(_NOWHERE)


class BlockPool:
    """Blocks with reference counts. A block is always in exactly one of three places:

    - blank: in the first `_blanks` of `_blank`, content worthless;
    - cached: unreferenced but published, so somebody may want its content again; evicted least recently used first, and
      only when blank ones do not suffice, then at least `ahead` at once: it takes as long as evicting one;
    - owned: `refs` says by how many block tables.

    `_queue[_head:_tail]` is the order of eviction. `_place` says of each block where in it it was named last. A name
    that stands elsewhere, or whose block is owned again, is stepped over. So sharing a prefix is a few vector
    operations, and nothing is ever taken out of the middle.

    Block 0 is the null block: a padding row of an engine writes there. It is never handed out, so `total` is
    `num_blocks - 1`. `published`: whether a block's content can be found; its owner is who sets it. `on_evict` is told
    the blocks whose content is given up, while they are still published; `on_withdraw` those whose content is wrong,
    by default the same. `cached` counts the cached ones.
    """

    def __init__(
        self,
        num_blocks: int,
        on_evict: Callable[[Blocks], object],
        on_withdraw: Callable[[Blocks], object] | None = None,
        ahead: int = 0,
    ) -> None:
        self.total = num_blocks - 1
        self._ahead = ahead
        self.evictions = 0
        self._on_evict = on_evict
        self._on_withdraw = on_withdraw or on_evict
        self._queue: Blocks = np.zeros(2 * num_blocks + _SLACK, np.int64)
        self._positions = np.arange(self._queue.size)
        self._once = np.ones(num_blocks, np.int64).tobytes()
        self.clear()

    def clear(self) -> None:
        """Every block is blank again: the memory behind the pool is gone. No block is reported as evicted."""
        self._blank: Blocks = np.arange(self.total, 0, -1, dtype=np.int64)
        self._blanks = self.total
        self._head = self._tail = 0
        self._place = np.full(self.total + 1, _NOWHERE, np.int64)
        self.cached = 0
        self.refs = np.zeros(self.total + 1, np.int64)
        self.published = np.zeros(self.total + 1, np.bool_)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now."""
        return self._blanks + self.cached

    @property
    def used(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> Blocks | None:
        """`count` blocks, each with one reference that the caller now owns; None, and nothing taken, if too few."""
        missing = count - self._blanks
        if missing > 0:
            if missing > self.cached:
                return None
            self._stock(max(missing, min(self._ahead, self.cached)))
        end = self._blanks
        self._blanks = end - count
        taken = self._blank[end - count : end][::-1].copy()
        self.refs[taken] = _ONE
        return taken

    def share(self, blocks: Blocks) -> None:
        """One more reference on each, owned by the caller. The blocks are owned or cached, not blank."""
        if not blocks.size:
            return
        counts = self.refs[blocks]
        self.cached -= counts.size - int(np.count_nonzero(counts))
        self.refs[blocks] = counts + _ONE

    def release(self, blocks: Blocks) -> None:
        """Gives back one reference on each block of one block table, in the order of the table.

        They are freed from the tail, so that a continuation is evicted before the prefix it hangs on.
        """
        if not blocks.size:
            return
        counts = self.refs[blocks]
        if counts.tobytes() == self._once[: counts.nbytes]:  # nearly always: shared with nobody
            self.refs[blocks] = _NONE
        else:
            self.refs[blocks] = counts - _ONE
            blocks = blocks[counts == _ONE]
            if not blocks.size:
                return
        free = blocks[::-1].copy()  # indexing by what stands backwards takes three times as long
        kept = self.published[free]
        flags = kept.tobytes()  # bytes are searched faster than small arrays
        first = flags.find(1)
        if first < 0:
            self._make_blank(free)
        elif flags.find(0, first) < 0:  # nearly always: unpublished are only the last ones of a table
            if first:
                self._make_blank(free[:first])
            self._enqueue(free[first:])
        else:
            self._make_blank(free[~kept])
            self._enqueue(free[kept])

    def withdraw(self, blocks: Blocks) -> None:
        """Their content is not to be served again. Owners keep them; idle ones become blank."""
        blocks = blocks[self.published[blocks]][::-1]
        if not blocks.size:
            return
        self._on_withdraw(blocks)
        self.published[blocks] = NO
        self._place[blocks] = _OUT
        idle = blocks[self.refs[blocks] == 0]
        self.cached -= idle.size
        self._make_blank(idle)

    def check(self) -> None:
        """Raises CoreInvariantError unless every block is in exactly one place and counted there."""
        owned = self.refs.nonzero()[0].tolist()
        blank, cached = self._blank[: self._blanks], self._waiting(self._head, self._tail)
        places = Counter[int]([*blank.tolist(), *cached.tolist(), *owned])
        require(set(places) == set(range(1, self.total + 1)), "a block is lost, or the null block was handed out")
        twice = [block for block, count in places.items() if count > 1]
        require(not twice, f"blocks {twice} are in two places at once")
        require(int(self.refs.min()) >= 0, "a block was released more often than owned")
        require(cached.size == self.cached, "cached blocks are miscounted")
        require(not self.published[blank].any(), "a blank block is published")
        require(self.published[cached].all(), "a cached block is not published")

    def _stock(self, count: int) -> None:
        """Makes so many cached blocks blank, to be given after those that are blank already."""
        blank, end = self._blank, self._blanks
        if end:
            blank[count : count + end] = blank[:end].copy()
        blank[:count] = self._evict(count)
        self._blanks = end + count

    def _evict(self, count: int) -> Blocks:
        """Gives up the content of so many cached blocks, which are the caller's then."""
        start, end = self._head, self._head + count
        if self._tail - start == self.cached or (end <= self._tail and all_of(self._evictable(start, end))):
            blocks = self._queue[start:end]  # nearly always: nobody has come back for any of them
            self._head = end
        else:
            blocks = self._oldest(count)
        self._on_evict(blocks)
        self.published[blocks] = NO
        self.cached -= count
        self.evictions += count
        return blocks

    def _oldest(self, count: int) -> Blocks:
        found: list[Blocks] = []
        missing = count
        while missing:
            start, stop = self._head, min(self._head + max(missing, _LOOK), self._tail)
            require(start < stop, "fewer blocks are cached than are counted")  # or this would go on for ever
            idle = self._idle(start, stop)[:missing]
            self._head = stop if idle.size < missing else start + idle.item(-1) + 1
            found.append(self._queue[start + idle])
            missing -= idle.size
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _evictable(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Which names in this part of the queue are of blocks that may be evicted."""
        blocks = self._queue[start:stop]
        idle: npt.NDArray[np.bool_] = (self._place[blocks] == self._positions[start:stop]) & (self.refs[blocks] == 0)
        return idle

    def _idle(self, start: int, stop: int) -> npt.NDArray[np.intp]:
        """Where they are, counted from `start`."""
        return self._evictable(start, stop).nonzero()[0]

    def _waiting(self, start: int, stop: int) -> Blocks:
        """The blocks that may be evicted, of this part of the queue."""
        return self._queue[start + self._idle(start, stop)]

    def _enqueue(self, cached: Blocks) -> None:
        size = cached.size
        self.cached += size
        if self._tail + size > self._queue.size:  # much of it is to be stepped over: O(1) for each that ever came in
            idle = self._waiting(self._head, self._tail)  # perhaps with old names of these; there is room for both
            self._queue[: idle.size] = idle
            self._place[idle] = self._positions[: idle.size]
            self._head, self._tail = 0, idle.size
        end = self._tail + size
        self._queue[self._tail : end] = cached
        self._place[cached] = self._positions[self._tail : end]
        self._tail = end

    def _make_blank(self, blocks: Blocks) -> None:
        end = self._blanks + blocks.size
        self._blank[self._blanks : end] = blocks
        self._blanks = end
