"""The block pool against a plain model of it, and the sizing of a cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from treadle.kvcache import BlockPool, Blocks, CoreInvariantError


def make(num_blocks: int = 6, ahead: int = 0) -> tuple[BlockPool, list[int]]:
    evicted: list[int] = []
    return BlockPool(num_blocks, lambda blocks: evicted.extend(blocks.tolist()), ahead=ahead), evicted


def array(blocks: list[int]) -> Blocks:
    return np.array(blocks, np.int64)


def publish(pool: BlockPool, *blocks: int) -> None:
    pool.published[list(blocks)] = True


def taken(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks.tolist()


def test_null_block_is_never_handed_out_and_all_others_are() -> None:
    pool, _ = make(6)
    assert sorted(taken(pool, 5)) == [1, 2, 3, 4, 5]
    assert pool.available == 0 and pool.used == pool.total == 5


def test_too_many_takes_nothing() -> None:
    pool, _ = make(6)
    taken(pool, 3)
    assert pool.allocate(3) is None
    assert pool.available == 2
    assert taken(pool, 0) == []
    pool.check()


def test_shared_block_is_free_after_the_last_owner() -> None:
    pool, _ = make()
    blocks = taken(pool, 2)
    pool.share(array(blocks[:1]))
    pool.release(array(blocks))
    assert pool.used == 1
    pool.release(array(blocks[:1]))
    assert pool.used == 0
    pool.check()


def test_a_block_that_is_cached_again_and_again_is_evicted_by_its_last_release() -> None:
    """And the order of eviction does not grow, however often a prefix is used while nothing is evicted."""
    pool, evicted = make(6)
    old, hot, cold = taken(pool, 1), taken(pool, 2), taken(pool, 2)
    publish(pool, *old, *hot, *cold)
    pool.release(array(old))
    pool.release(array(hot))
    for _ in range(200):
        pool.share(array(hot))
        pool.release(array(hot))
        pool.check()
    pool.release(array(cold))
    assert pool._tail <= pool._queue.size < 100
    taken(pool, 5)
    assert evicted == [*old, *reversed(hot), *reversed(cold)]


def test_blank_before_cached_and_cached_least_recently_used_first() -> None:
    pool, evicted = make(6)
    first, second = taken(pool, 1), taken(pool, 1)
    publish(pool, *first, *second)
    pool.release(array(first))
    pool.release(array(second))
    assert (pool.cached, pool.available) == (2, 5)
    taken(pool, 3)
    assert not evicted
    pool.share(array(first))  # used again: now the other is the older
    pool.release(array(first))
    assert taken(pool, 1) == second
    assert evicted == second and pool.evictions == 1
    pool.check()


def test_ahead_are_the_oldest_and_given_after_the_blank_ones() -> None:
    pool, evicted = make(9, ahead=3)
    blocks = taken(pool, 6)
    publish(pool, *blocks)
    pool.release(array(blocks))
    assert taken(pool, 3) == [7, 8, blocks[3]]
    assert evicted == [*reversed(blocks[3:])] and pool.evictions == 3
    assert (pool.cached, pool.available) == (3, 5)
    assert taken(pool, 5) == [*blocks[4:], *blocks[:3]] and len(evicted) == 6
    pool.check()


def test_tail_of_a_sequence_is_evicted_before_its_head() -> None:
    pool, evicted = make(4)
    blocks = taken(pool, 3)
    publish(pool, *blocks)
    pool.release(array(blocks))
    taken(pool, 2)
    assert evicted == [blocks[2], blocks[1]]


def test_a_cached_block_that_is_owned_again_is_passed_over() -> None:
    pool, evicted = make(5)
    blocks = taken(pool, 4)
    publish(pool, *blocks)
    pool.release(array(blocks))
    pool.share(array(blocks[2:3]))
    assert (pool.cached, pool.used) == (3, 1)
    assert sorted(taken(pool, 3)) == sorted([*blocks[:2], blocks[3]])
    assert evicted == [blocks[3], blocks[1], blocks[0]]
    pool.release(array(blocks[2:3]))
    assert taken(pool, 1) == blocks[2:3] and evicted[3:] == blocks[2:3]
    pool.check()


def test_who_waits_keeps_its_turn_when_the_queue_is_written_anew() -> None:
    """After so many uses of another block: the queue holds two names for each block, and some more."""
    pool, evicted = make(9)
    old, hot, young = taken(pool, 3), taken(pool, 1), taken(pool, 4)
    publish(pool, *old, *hot, *young)
    for table in (hot, old, young):
        pool.release(array(table))
    for _ in range(300):
        pool.share(array(hot))
        pool.release(array(hot))
        pool.check()
    taken(pool, 8)
    assert evicted == [*reversed(old), *reversed(young), *hot]


def test_withdrawn_content_is_gone_at_once_and_owners_keep_the_block() -> None:
    pool, evicted = make()
    blocks = taken(pool, 2)
    publish(pool, *blocks)
    pool.release(array(blocks[1:]))
    pool.withdraw(array([blocks[0]]))
    pool.withdraw(array([blocks[1]]))
    pool.withdraw(array([blocks[1]]))
    assert len(evicted) == 2 and pool.cached == 0 and pool.used == 1 and pool.evictions == 0
    pool.check()


def test_check_sees_a_double_release() -> None:
    pool, _ = make()
    blocks = taken(pool, 1)
    pool.release(array(blocks))
    pool.release(array(blocks))
    with pytest.raises(CoreInvariantError):
        pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Tables of blocks come, are shared and go; counts must agree at any time."""

    ahead = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.evicted = make(9, self.ahead)
        self.tables: list[list[int]] = []
        self.published: set[int] = set()
        self.cached: list[int] = []  # least recently used first

    @rule(count=st.integers(0, 6), mark=st.booleans())
    def allocate(self, count: int, mark: bool) -> None:
        available, blank = self.pool.available, self.pool.available - self.pool.cached
        self.evicted.clear()
        given = self.pool.allocate(count)
        assert (given is None) == (count > available)
        if given is None:
            return
        blocks = given.tolist()
        missing = count - blank
        oldest = self.cached[: max(missing, self.ahead)] if missing > 0 else []
        assert self.evicted == oldest
        del self.cached[: len(oldest)]
        self.published.difference_update(oldest)
        owned = {block for table in self.tables for block in table}
        assert len(set(blocks)) == count and not owned & set(blocks) and 0 not in blocks
        self.tables.append(blocks)
        if mark:
            publish(self.pool, *blocks)
            self.published.update(blocks)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 100), keep=st.integers(0, 6))
    def share(self, pick: int, keep: int) -> None:
        prefix = self.tables[pick % len(self.tables)][:keep]
        self.pool.share(array(prefix))
        self.tables.append(prefix)

    @precondition(lambda self: self.cached)
    @rule(pick=st.sets(st.integers(0, 8), min_size=1))
    def share_cached(self, pick: set[int]) -> None:
        hit = [block for index, block in enumerate(self.cached) if index in pick]
        self.pool.share(array(hit))
        self.tables.append(hit)
        self.cached = [block for block in self.cached if block not in hit]

    @precondition(lambda self: self.published)
    @rule(pick=st.integers(0, 100))
    def withdraw(self, pick: int) -> None:
        block = sorted(self.published)[pick % len(self.published)]
        self.pool.withdraw(array([block]))
        self.published.remove(block)
        if block in self.cached:
            self.cached.remove(block)

    @precondition(lambda self: self.tables)
    @rule(pick=st.integers(0, 100))
    def release(self, pick: int) -> None:
        table = self.tables.pop(pick % len(self.tables))
        self.pool.release(array(table))
        owned = {block for other in self.tables for block in other}
        self.cached += [block for block in reversed(table) if block in self.published and block not in owned]

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.cached == len(self.cached)
        assert self.pool.used == len({block for table in self.tables for block in table})


class AheadMachine(PoolMachine):
    ahead = 3


PoolMachine.TestCase.settings = settings(max_examples=60, deadline=None, derandomize=True)
AheadMachine.TestCase.settings = PoolMachine.TestCase.settings
TestPoolMachine = PoolMachine.TestCase
TestAheadMachine = AheadMachine.TestCase
