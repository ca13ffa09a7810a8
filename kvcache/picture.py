"""A small picture of a block pool, for people."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .block_pool import BlockPool

_SAMPLE = 8
_FIFTEENTHS = 15
Bools = npt.NDArray[np.bool_]


def picture(pool: BlockPool, cells: int = 1024) -> tuple[bytes, int]:
    """(at most `cells` bytes, blocks that each stands for). The null block is left out; the last cell may be smaller.

    High half of a byte: the share of its blocks that somebody owns; low half: the share that is cached and not owned;
    in fifteenths, rounded up, so that one block shows. Of cells of more than 8 blocks every second, third, … is looked
    at, 8 at most of each, so that a pool of millions takes no longer.
    """
    per_cell = max(1, -(-pool.total // cells))
    stride = -(-per_cell // _SAMPLE)
    per_cell += -per_cell % stride
    looked = slice(1, None, stride)
    owned = pool.refs[looked] > 0
    cached = pool.published[looked] & ~owned
    size = per_cell // stride
    return ((_shares(owned, size) << 4) | _shares(cached, size)).tobytes(), per_cell


def _shares(flags: Bools, size: int) -> npt.NDArray[np.uint8]:
    """Of each `size` flags the share that is set, in fifteenths, rounded up."""
    starts = np.arange(0, flags.size, size)
    if not starts.size:
        return np.zeros(0, np.uint8)
    counts = np.add.reduceat(flags.astype(np.int32), starts)
    sizes = np.minimum(size, flags.size - starts)
    return (-(-counts * _FIFTEENTHS // sizes)).astype(np.uint8)
