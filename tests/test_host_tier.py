"""The second tier of the prefix cache, block by block: what moves where, and what is never overwritten too early."""

from __future__ import annotations

import numpy as np
import pytest

from treadle.kvcache import Blocks, CoreInvariantError, PrefixCache
from treadle.transport.codec import pack

SIZE = 4
TEXT = list(range(16))


def array(blocks: list[int]) -> Blocks:
    return np.array(blocks, np.int64)


def cached(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[int]:
    """A sequence of full blocks that has been computed and has ended."""
    blocks = cache.pool.allocate(len(tokens) // SIZE)
    assert blocks is not None
    cache.publish(salt, pack(tokens), blocks)
    cache.pool.release(blocks)
    cache.check()
    return blocks.tolist()


def hit_of(cache: PrefixCache, tokens: list[int], salt: str = "") -> Blocks:
    return cache.match(salt, pack(tokens), len(tokens) // SIZE)[0]


def found(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[int]:
    return hit_of(cache, tokens, salt).tolist()


def allocate(cache: PrefixCache, count: int) -> list[int]:
    blocks = cache.pool.allocate(count)
    assert blocks is not None
    return blocks.tolist()


def tier(num_blocks: int = 5, host_blocks: int = 4) -> PrefixCache:
    cache = PrefixCache(num_blocks, SIZE, host_blocks)
    cache.saving = True
    return cache


def test_what_the_device_gives_up_is_found_in_host_memory() -> None:
    cache = tier()
    blocks = cached(cache, TEXT)
    taken = allocate(cache, 3)
    cache.check()
    assert found(cache, TEXT) == [blocks[0], 7, 6, 5]  # the tail went first
    assert cache.host.take_copies() == ([blocks[3], 0, blocks[2], 1, blocks[1], 2], [])
    assert len(taken) == 3 and cache.host.take_copies() == ([], [])
    cache.check()


def test_a_hit_comes_back_to_new_blocks_and_leaves_host_memory() -> None:
    cache = tier()
    blocks = cached(cache, TEXT)
    other = allocate(cache, 2)
    cache.host.take_copies()
    cache.pool.release(array(other))
    hit = hit_of(cache, TEXT)
    assert cache.in_host(hit) == 2
    cache.pool.share(cache.on_device(hit))
    fetched = cache.fetch(hit, 0)
    cache.check()
    assert fetched is not None
    table = fetched.tolist()
    assert table[:2] == blocks[:2] and set(table[2:]) == set(other)
    assert found(cache, TEXT) == table
    assert cache.host.take_copies() == ([], [1, table[2], 0, table[3]])
    cache.check()
    assert (cache.host.saved, cache.host.fetched, len(cache.host.kept)) == (2, 2, 0)


def test_a_place_that_the_plan_reads_is_written_by_the_next_plan_only() -> None:
    """Copies out come before copies in: in one plan the place of what comes back is not free for what goes out."""
    cache = tier(num_blocks=4, host_blocks=2)
    first = cached(cache, TEXT[:8])
    cache.pool.allocate(1)
    assert allocate(cache, 1) == [first[1]]  # to host block 0
    cache.pool.release(array(first[1:2]))
    cache.host.take_copies()
    hit = hit_of(cache, TEXT[:8])
    cache.pool.share(hit[:1])
    assert cache.fetch(hit, 0) is not None
    cached_other = hit_of(cache, TEXT[:8])
    cache.pool.release(cached_other)
    assert cache.pool.allocate(2) is not None  # evicts both: there is one place that is free in this plan
    out, back = cache.host.take_copies()
    assert back[0] == 0 and out[1::2] == [1]
    cache.check()


def test_a_full_tier_gives_up_its_oldest_but_nothing_of_the_plan_in_the_making() -> None:
    cache = tier(num_blocks=9, host_blocks=2)
    old, new = cached(cache, TEXT[:8]), cached(cache, [9] * 8)
    assert cache.pool.allocate(4) is not None
    assert allocate(cache, 1) == [old[1]]
    cache.host.take_copies()
    assert allocate(cache, 1) == [old[0]]
    assert cache.in_host(hit_of(cache, TEXT[:8])) == 2
    cache.host.take_copies()
    assert allocate(cache, 1) == [new[1]]
    assert cache.host.evictions == 1 and found(cache, TEXT[:8]) == [cache.host.first + 1]
    assert allocate(cache, 1) == [new[0]]
    assert found(cache, TEXT[:8]) == [] and cache.in_host(hit_of(cache, [9] * 8)) == 2
    cache.check()


def test_more_than_a_plan_can_hold_is_forgotten() -> None:
    cache = tier(num_blocks=5, host_blocks=2)
    blocks = cached(cache, TEXT)
    cache.pool.allocate(4)
    out, _ = cache.host.take_copies()
    assert out == [blocks[3], 0, blocks[2], 1] and found(cache, TEXT) == [] and cache.host.evictions == 0
    cache.check()


def test_what_is_computed_again_takes_its_place_back() -> None:
    cache = tier()
    cached(cache, TEXT)
    taken = allocate(cache, 3)
    cache.host.take_copies()
    parent = cache.end_of(hit_of(cache, TEXT)[:1], "")
    cache.publish(parent, pack(TEXT[4:12]), array(taken[:2]))
    cache.check()
    assert found(cache, TEXT)[1:3] == taken[:2] and cache.in_host(hit_of(cache, TEXT)) == 1
    assert cache.host.take_copies() == ([], [])
    cache.publish(cache.end_of(hit_of(cache, TEXT)[:3], ""), pack(TEXT[12:]), array(taken[2:]))
    cache.check()
    assert not cache.host.kept and found(cache, TEXT)[1:] == taken


def test_a_copy_that_has_not_left_need_not_when_its_content_is_there_again() -> None:
    cache = tier()
    cached(cache, TEXT[:4])
    assert cache.pool.allocate(3) is not None
    taken = allocate(cache, 1)
    assert cache.host.pending == (1, 0)
    cache.publish("", pack(TEXT[:4]), array(taken))
    assert cache.host.take_copies() == ([], []) and found(cache, TEXT[:4]) == taken
    cache.check()


def test_out_and_in_by_one_plan() -> None:
    cache = tier(num_blocks=3, host_blocks=2)
    blocks = cached(cache, TEXT[:8])
    taken = allocate(cache, 1)
    assert taken == [blocks[1]]
    cache.pool.release(array(taken))
    hit = hit_of(cache, TEXT[:8])
    cache.pool.share(hit[:1])
    table = cache.fetch(hit, 0)
    assert table is not None and table.tolist() == blocks
    assert cache.host.take_copies() == ([blocks[1], 0], [0, blocks[1]])
    cache.check()


def test_only_what_is_wanted_moves_when_others_are_not_worth_it() -> None:
    cache = tier()
    cache.saving = False
    first, second = cached(cache, TEXT[:8]), cached(cache, [9] * 8)
    cache.want(array(second))
    cache.pool.allocate(4)
    assert found(cache, TEXT[:8]) == [] and cache.in_host(hit_of(cache, [9] * 8)) == 2
    assert cache.host.take_copies()[0][::2] == second[::-1] and first
    cache.check()


def test_withdrawn_content_goes_nowhere() -> None:
    cache = tier()
    blocks = cached(cache, TEXT)
    cache.want(array(blocks))
    cache.pool.withdraw(array(blocks))
    cache.pool.allocate(4)
    assert cache.host.take_copies() == ([], []) and not cache.host.kept
    cache.check()


def test_salts_do_not_meet_in_host_memory() -> None:
    cache = tier()
    cached(cache, TEXT, "a")
    cache.pool.allocate(4)
    assert found(cache, TEXT) == [] and cache.in_host(hit_of(cache, TEXT, "a")) == 4


def test_clear_forgets_both_tiers() -> None:
    cache = tier()
    cached(cache, TEXT)
    cache.pool.allocate(4)
    cache.clear()
    cache.check()
    assert found(cache, TEXT) == [] and cache.host.take_copies() == ([], []) and len(cache) == 0


def test_too_few_blocks_take_nothing() -> None:
    cache = tier()
    cached(cache, TEXT)
    assert cache.pool.allocate(4) is not None
    assert cache.fetch(hit_of(cache, TEXT), 0) is None and cache.in_host(hit_of(cache, TEXT)) == 4
    cache.check()


def test_check_sees_a_place_that_is_lost() -> None:
    cache = tier()
    cached(cache, TEXT)
    cache.pool.allocate(4)
    cache.host.kept.popitem()
    with pytest.raises(CoreInvariantError, match="host block"):
        cache.check()
