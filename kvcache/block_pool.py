"""Who holds which block of key/value cache. Every operation is O(1) per block."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NewType

from .invariant import require

BlockId = NewType("BlockId", int)
Label = tuple[int | str, bytes]


class BlockPool:
    """Blocks with reference counts. A block is always in exactly one of three places:

    - blank: in `_blank`, content worthless;
    - cached: in `_idle`, unreferenced but labelled, so somebody may want its content again; evicted least recently
      used first, and only when no blank block is left;
    - owned: `refs` says by how many block tables.

    Block 0 is the null block: a padding row of an engine writes there. It is never handed out, so `total` is
    `num_blocks - 1`. `on_evict` is told the label of every block whose content is given up.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[Label], object]) -> None:
        self.total = num_blocks - 1
        self.evictions = 0
        self._on_evict = on_evict
        self.clear()

    def clear(self) -> None:
        """Every block is blank again: the memory behind the pool is gone. No label is reported as evicted."""
        self._blank = [BlockId(block) for block in range(self.total, 0, -1)]
        self._idle: OrderedDict[BlockId, None] = OrderedDict()
        self.refs = [0] * (self.total + 1)
        self.labels: list[Label | None] = [None] * (self.total + 1)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give now."""
        return len(self._blank) + len(self._idle)

    @property
    def cached(self) -> int:
        """Unreferenced blocks with content that may be asked for again."""
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.total - self.available

    def is_idle(self, block: BlockId) -> bool:
        return self.refs[block] == 0

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks, each with one reference that the caller now owns; None, and nothing taken, if too few."""
        missing = count - len(self._blank)
        if missing > len(self._idle):
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
        refs, idle = self.refs, self._idle
        for block in blocks:
            if refs[block]:
                refs[block] += 1
            else:
                del idle[block]
                refs[block] = 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Gives back one reference on each block of one block table, in the order of the table.

        They are freed from the tail, so that a continuation is evicted before the prefix it hangs on.
        """
        refs, labels, idle, blank = self.refs, self.labels, self._idle, self._blank
        for block in reversed(blocks):
            left = refs[block] - 1
            refs[block] = left
            if not left:
                if labels[block] is None:
                    blank.append(block)
                else:
                    idle[block] = None

    def withdraw(self, block: BlockId) -> None:
        """Its content is not to be served again. Owners keep it; an idle block becomes blank."""
        label = self.labels[block]
        if label is None:
            return
        self.labels[block] = None
        self._on_evict(label)
        if not self.refs[block]:
            del self._idle[block]
            self._blank.append(block)

    def check(self) -> None:
        """Raises CoreInvariantError unless every block is in exactly one place and counted there."""
        owned = [block for block, count in enumerate(self.refs) if count]
        places = Counter[int]([*self._blank, *self._idle, *owned])
        require(set(places) == set(range(1, self.total + 1)), "a block is lost, or the null block was handed out")
        twice = [block for block, count in places.items() if count > 1]
        require(not twice, f"blocks {twice} are in two places at once")
        require(min(self.refs) >= 0, "a block was released more often than owned")
        require(all(self.labels[block] is None for block in self._blank), "a blank block has a label")
        require(all(self.labels[block] is not None for block in self._idle), "a cached block has no label")

    def _evict(self, count: int) -> None:
        pop, labels, on_evict = self._idle.popitem, self.labels, self._on_evict
        blocks = [pop(False)[0] for _ in range(count)]
        for block in blocks:
            label = labels[block]
            labels[block] = None
            if label is not None:
                on_evict(label)
        self._blank += blocks
        self.evictions += count
