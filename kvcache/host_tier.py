"""The second tier of the prefix cache: blocks in host memory that hold what the device has given up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from .block_pool import BlockId
from .invariant import require

Copies = tuple[list[int], list[int]]
"""Of one plan, flat: (device, host) pairs to copy out, and (host, device) pairs to copy in. Host blocks from 0."""


class HostTier:
    """Host blocks, and the copies of the plan that is being made. Every operation is O(1) per block.

    In the trie a host block is a block number too, from `first` on, behind all those of the device. It is always in
    exactly one place:

    - blank: content worthless;
    - kept: published, for somebody may want its content; given up oldest first when a place is needed;
    - leaving: given up since the last plan. The plan in the making may still copy from it, so it is blank only after
      `take_copies`.

    A content is in one tier at a time. `save` takes over what the device gives up, `hold` and `arrive` give it back to
    a device block, `drop` forgets it because a device block has the same. Ranks execute plans strictly in order, and
    in a plan all copies out, then all copies in, then the step. So a host block may be written by the next plan after
    the one that reads it, and a device block by the very plan that copies it out. Within a plan no block is written
    twice: a place whose copy out is in the plan being made is not given up for another.

    on_evict: is told what is given up. saved, fetched, evictions: blocks so far.
    """

    def __init__(self, first: int, total: int, on_evict: Callable[[BlockId], object]) -> None:
        self.first = first
        self.total = total
        self.saved = self.fetched = self.evictions = 0
        self._on_evict = on_evict
        self.clear()

    def clear(self) -> None:
        """The ranks are gone, and their host memory with them."""
        self._blank = [BlockId(place) for place in range(self.first + self.total - 1, self.first - 1, -1)]
        self.kept: OrderedDict[BlockId, None] = OrderedDict()
        self._leaving: list[BlockId] = []
        self._out: dict[BlockId, int] = {}
        self._in: dict[int, BlockId] = {}

    @property
    def pending(self) -> tuple[int, int]:
        """Blocks to copy out and in by the plan in the making."""
        return len(self._out), len(self._in)

    # ── what moves ──

    def save(self, block: int) -> BlockId | None:
        """A place for what the device block holds, which its owner may overwrite from this plan on; None when full."""
        place = self._place()
        if place is None:
            return None
        self.kept[place] = None
        self._out[place] = block
        self.saved += 1
        return place

    def hold(self, place: BlockId) -> None:
        """Its content is about to be fetched: it is not given up for others meanwhile. `arrive` must follow."""
        del self.kept[place]
        self._leaving.append(place)

    def arrive(self, place: BlockId, block: int) -> None:
        """The content of a held place goes to this device block, which the caller owns."""
        self._in[block] = place
        self.fetched += 1

    def drop(self, place: BlockId) -> None:
        """A device block holds the same content; a copy that has not left yet need not."""
        del self.kept[place]
        self._out.pop(place, None)
        self._leaving.append(place)

    def take_copies(self) -> Copies:
        """The copies of the plan that is handed out now; what has left is blank for the next one."""
        first = self.first
        out = [number for place, block in self._out.items() for number in (block, place - first)]
        back = [number for block, place in self._in.items() for number in (place - first, block)]
        self._out.clear()
        self._in.clear()
        self._blank += reversed(self._leaving)
        self._leaving.clear()
        return out, back

    def check(self) -> None:
        """Raises CoreInvariantError unless every place is in exactly one state, and copies are of what they may be."""
        places = [*self._blank, *self.kept, *self._leaving]
        require(sorted(places) == list(range(self.first, self.first + self.total)), "a host block is lost or twice")
        require(set(self._out) <= {*self.kept, *self._leaving}, "a copy goes out to a block that nobody keeps")
        require(set(self._in.values()) <= set(self._leaving), "a copy comes in from a block that may be overwritten")
        require(len(set(self._in.values())) == len(self._in), "a host block is fetched twice")
        device = [*self._out.values(), *self._in]
        require(all(0 < block < self.first for block in device), "a copy of a block that the device has not")

    def _place(self) -> BlockId | None:
        """The newest are last in `kept`: if the copy to the oldest is in this plan, so are those to all others."""
        if self._blank:
            return self._blank.pop()
        oldest = next(iter(self.kept), None)
        if oldest is None or oldest in self._out:
            return None
        del self.kept[oldest]
        self._on_evict(oldest)
        self.evictions += 1
        return oldest
