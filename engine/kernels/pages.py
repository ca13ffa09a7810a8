"""Where the keys of a tile lie, for any page size.

The page numbers of a tile are loaded one iteration before its keys and values. Inside one iteration, the loads of keys
would wait for them, and Triton's pipeline would spend half of its depth on the numbers instead of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def page_of(pages, start, end, key, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The page of every key of the tile [start, start + KEYS), int32 [KEYS], or one for all where a page holds them.

    Entries from `end` on are not read: the null page stands in.
    """
    if BLOCK_SIZE % KEYS == 0:
        return tl.load(pages + start // BLOCK_SIZE, mask=start < end, other=0)
    else:
        spot = start + key
        return tl.load(pages + spot // BLOCK_SIZE, mask=spot < end, other=0)


@triton.jit
def page_place(start, key, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Each key's place in its page, int32 [KEYS]."""
    if BLOCK_SIZE % KEYS == 0:
        return start % BLOCK_SIZE + key
    else:
        return (start + key) % BLOCK_SIZE


@triton.jit
def widen(page):
    """To 64 bits, as caches have more elements than 32 bits count, and to a column."""
    if len(page.shape) == 0:
        return page.to(tl.int64)
    else:
        return page.to(tl.int64)[:, None]
