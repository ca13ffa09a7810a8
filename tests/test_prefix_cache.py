"""The prefix cache: what it finds, what it must never find, and what it forgets."""

from __future__ import annotations

from array import array as c_array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from treadle.kvcache import Blocks, Parent, PrefixCache
from treadle.kvcache.run import Run
from treadle.transport.codec import pack

SIZE = 4


def array(blocks: list[int]) -> Blocks:
    return np.array(blocks, np.int64)


def publish(cache: PrefixCache, tokens: list[int], salt: str = "", parent: Parent | None = None) -> list[int]:
    """A sequence that computed all of its full blocks itself; the caller owns them."""
    blocks = cache.pool.allocate(len(tokens) // SIZE)
    assert blocks is not None
    cache.publish(salt if parent is None else parent, pack(tokens[: blocks.size * SIZE]), blocks)
    cache.check()
    return blocks.tolist()


def release(cache: PrefixCache, blocks: list[int]) -> None:
    cache.pool.release(array(blocks))
    cache.check()


def found(cache: PrefixCache, tokens: list[int], salt: str = "") -> list[int]:
    return cache.match(salt, pack(tokens), len(tokens) // SIZE)[0].tolist()


def test_finds_the_longest_common_prefix_in_full_blocks() -> None:
    cache = PrefixCache(20, SIZE)
    text = list(range(14))
    blocks = publish(cache, text)
    assert len(blocks) == 3
    assert found(cache, text) == blocks
    assert found(cache, text[:11]) == blocks[:2]
    assert found(cache, [*text[:8], 99, 99, 99, 99]) == blocks[:2]
    assert found(cache, [1, *text]) == []
    assert cache.match("", pack(text), 1)[0].tolist() == blocks[:1]
    assert cache.match("", pack(text), 0)[0].tolist() == []


def test_a_block_counts_only_behind_its_own_prefix() -> None:
    cache = PrefixCache(20, SIZE)
    publish(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    publish(cache, [3, 3, 3, 3])
    assert len(found(cache, [3, 3, 3, 3, 2, 2, 2, 2])) == 1
    assert found(cache, [2, 2, 2, 2]) == []


def test_salts_do_not_meet() -> None:
    cache = PrefixCache(20, SIZE)
    text = [1, 2, 3, 4]
    plain, salted = publish(cache, text), publish(cache, text, "tenant")
    assert found(cache, text) == plain and found(cache, text, "tenant") == salted and plain != salted
    assert found(cache, text, "other") == []


def test_tokens_with_zero_bytes_at_the_end_are_told_apart() -> None:
    cache = PrefixCache(20, SIZE)
    publish(cache, [7, 0, 0, 0])
    assert found(cache, [7, 0, 0, 256]) == [] and len(found(cache, [7, 0, 0, 0])) == 1


def test_what_is_found_by_the_key_of_others_is_no_hit() -> None:
    """The tokens of a run are compared whole, so a table of keys that confuses two prompts serves nobody's state."""
    cache = PrefixCache(20, SIZE)
    text, other = list(range(8)), [9, 9, 9, 9]
    publish(cache, text)
    cache._first["", pack(other)] = cache._first["", pack(text[:SIZE])]
    assert found(cache, other) == found(cache, [*other, *text[4:]]) == []
    assert cache.match("", pack(other), 1)[1] == ""


def test_equal_content_computed_twice_is_one_path() -> None:
    cache = PrefixCache(20, SIZE)
    text = list(range(12))
    first = publish(cache, text[:8])
    second = publish(cache, text)  # computed at the same time, one block further
    assert found(cache, text) == [*first, second[2]]
    release(cache, second)
    assert cache.pool.cached == 1  # its private copies are blank again


def test_blocks_are_found_after_release_and_gone_after_eviction() -> None:
    cache = PrefixCache(6, SIZE)
    text = list(range(12))
    blocks = publish(cache, text)
    release(cache, blocks)
    assert found(cache, text) == blocks
    cache.pool.allocate(3)  # two blank ones, and the tail of what is cached
    assert found(cache, text) == blocks[:2]
    cache.pool.allocate(2)
    assert found(cache, text) == [] and len(cache) == 0
    cache.check()


def test_orphans_are_never_found_again() -> None:
    """A block behind an evicted one stays unreachable even when equal content takes the evicted one's place."""
    cache = PrefixCache(20, SIZE)
    text = list(range(8))
    blocks = publish(cache, text)
    cache.pool.withdraw(array(blocks[:1]))
    publish(cache, text[:4])
    assert len(found(cache, text)) == 1
    cache.check()


def test_clear_forgets_everything() -> None:
    cache = PrefixCache(6, SIZE)
    text = list(range(8))
    publish(cache, text)
    cache.clear()
    cache.check()
    assert found(cache, text) == [] and cache.pool.available == 5


def test_sequences_part_inside_of_a_run_and_each_goes_on_where_it_was() -> None:
    cache = PrefixCache(30, SIZE)
    text = list(range(16))
    blocks = publish(cache, text)
    early, parent = cache.match("", pack(text), 1)[1], cache.match("", pack(text), 4)[1]
    other = publish(cache, [*text[:4], *[9] * 12])  # its first block remains private
    inside = publish(cache, [6] * 4, parent=early)  # in what is another run by now
    late = publish(cache, [7] * 4, parent=cache.match("", pack(text), 2)[1])
    further = publish(cache, [8] * 4, parent=parent)  # behind the end of what was split twice meanwhile
    assert found(cache, [*text, *[8] * 4]) == [*blocks, *further]
    assert found(cache, [*text[:4], *[9] * 12]) == [blocks[0], *other[1:]]
    assert found(cache, [*text[:8], *[7] * 4]) == [*blocks[:2], *late]
    assert found(cache, [*text[:4], *[6] * 4]) == [blocks[0], *inside]
    release(cache, blocks)
    cache.pool.allocate(cache.pool.available)
    cache.check()
    assert found(cache, text) == [] and cache.pool.published.sum() == 3 + 1 + 1 + 1  # private ones are not


def test_nothing_is_published_behind_what_was_evicted() -> None:
    """Not even when other tokens have come to stand at its depth meanwhile: they are not what the sequence computed."""
    cache = PrefixCache(8, SIZE)
    text = list(range(12))
    blocks = publish(cache, text)
    parent = cache.match("", pack(text), 3)[1]
    release(cache, blocks)
    others = cache.pool.allocate(5)  # four blank ones, and the last of what is cached
    assert others is not None and found(cache, text) == blocks[:2]
    cache.pool.withdraw(array(blocks[1:2]))
    cache.pool.release(others[:2])
    publish(cache, [9] * 8, parent=cache.match("", pack(text), 1)[1])
    own = array(blocks[2:])
    assert cache.publish(parent, pack([5] * 4), own) == parent
    assert len(found(cache, [*text[:4], *[9] * 8])) == 3
    assert len(found(cache, [*text[:4], *[9] * 8, *[5] * 4])) == 3
    cache.check()


def test_a_block_out_of_the_middle_leaves_what_is_before_it() -> None:
    cache = PrefixCache(8, SIZE)
    text = list(range(20))
    blocks = publish(cache, text)
    cache.pool.withdraw(array(blocks[2:3]))
    cache.check()
    assert found(cache, text) == blocks[:2] and len(cache) == 4
    assert [cache.content(block) for block in blocks[2:4]] == [None, pack(text[12:16])]
    release(cache, blocks)
    cache.pool.allocate(5)  # three that were blank, and the last two, which nothing leads to
    cache.check()
    assert found(cache, text) == blocks[:2] and len(cache) == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=14), st.booleans()), max_size=25))
def test_whatever_is_found_has_the_same_tokens(events: list[tuple[list[int], bool]]) -> None:
    """Texts of two symbols in a small pool: each hit must hold exactly the tokens asked for, prefix included."""
    cache = PrefixCache(9, 2)
    content: dict[int, list[int]] = {}
    for text, keep_first in events:
        hit, parent = cache.match("", pack(text), len(text) // 2)
        assert all(content[block] == text[: 2 * i + 2] for i, block in enumerate(hit.tolist()))
        cache.pool.share(hit)
        count = len(text) // 2 - hit.size
        fresh = cache.pool.allocate(count)
        if fresh is not None:
            content |= {block: text[: 2 * (hit.size + i) + 2] for i, block in enumerate(fresh.tolist())}
            cache.publish(parent, pack(text[2 * hit.size : 2 * (hit.size + count)]), fresh)
        table = hit if fresh is None else np.concatenate((hit, fresh))
        if keep_first:
            cache.pool.release(table)
        elif table.size:
            cache.pool.release(table[1:])
            cache.pool.release(table[:1])
        cache.check()


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 10))
def test_a_block_of_a_run_is_found_in_any_order_and_after_it_became_shorter(asked: list[int], left: int) -> None:
    numbers = [7, 3, 9, 1, 8, 2, 6, 0, 5, 4]
    run = Run(0, b"", {}, None, b"\0" * 40, c_array("q", numbers))
    for block in asked:
        assert run.index(block) == numbers.index(block)
    run.shorten(10 - left, 4)
    for block in asked:
        if block in numbers[:left]:
            assert run.index(block) == numbers.index(block)
        else:
            with pytest.raises(ValueError):
                run.index(block)


class RunMachine(RuleBasedStateMachine):
    """Sequences of two symbols that begin, go on block by block, and end, in any order, over both tiers.

    Whatever is found must have been computed with just these tokens, however runs were split, cut and evicted
    meanwhile. Blocks of `held` are what a sequence computed or found; `content` is the whole prefix of each block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(12, 2, host_blocks=3)
        self.content: dict[int, list[int]] = {}
        self.held: list[tuple[list[int], list[int], Parent]] = []

    def found(self, text: list[int]) -> tuple[Blocks, Parent]:
        hit, parent = self.cache.match("", pack(text), len(text) // 2)
        assert [self.content[block] for block in hit.tolist()] == [text[: 2 * i + 2] for i in range(hit.size)]
        return hit, parent

    @rule(zeros=st.integers(0, 5), ones=st.integers(0, 3), saving=st.booleans())
    def begin(self, zeros: int, ones: int, saving: bool) -> None:
        """Texts that part from each other after any number of blocks."""
        self.cache.saving = saving
        text = [0, 0] * zeros + [1, 1] * ones + [0, 0]
        hit, parent = self.found(text)
        self.cache.pool.share(hit[hit < 12])
        away = self.cache.in_host(hit)
        before = [self.content[block] for block in hit.tolist()]
        table = self.cache.fetch(hit, len(text) // 2 - hit.size)
        if table is None:
            self.cache.pool.release(hit[hit < 12])
            return
        assert (table[: hit.size] < 12).all() and away <= hit.size
        self._note_host()
        blocks = table.tolist()
        self.content |= dict(zip(blocks, before, strict=False))
        self.content |= {block: text[: 2 * i + 2] for i, block in enumerate(blocks) if i >= hit.size}
        parent = self.cache.publish(parent, pack(text[2 * hit.size :]), table[hit.size :])
        self.held.append((text, blocks, parent))

    @precondition(lambda self: self.held)
    @rule(picks=st.lists(st.integers(0, 20), min_size=1, max_size=3), more=st.lists(st.booleans(), min_size=3))
    def go_on(self, picks: list[int], more: list[bool]) -> None:
        chosen = sorted({pick % len(self.held) for pick in picks})
        blocks = self.cache.pool.allocate(len(chosen))
        if blocks is None:
            return
        self._note_host()
        for index, one, block in zip(chosen, more, blocks.tolist(), strict=False):
            text, table, parent = self.held[index]
            content = [int(one)] * 2
            self.content[block] = text + content
            parent = self.cache.publish(parent, pack(content), array([block]))
            self.held[index] = text + content, [*table, block], parent

    @precondition(lambda self: self.held)
    @rule(pick=st.integers(0, 20), fault=st.booleans())
    def end(self, pick: int, fault: bool) -> None:
        _, table, _ = self.held.pop(pick % len(self.held))
        if fault:
            self.cache.pool.withdraw(array(table))
        self.cache.pool.release(array(table))

    @invariant()
    def holds(self) -> None:
        self.cache.check()
        for text, _, _ in self.held:
            self.found(text)
            self.found([*text[:-1], 1 - text[-1]])

    def _note_host(self) -> None:
        """A plan is handed out: what has moved to host memory is what the device block held until now."""
        out, _ = self.cache.host.take_copies()
        self.content |= {12 + place: self.content[block] for block, place in zip(out[::2], out[1::2], strict=True)}


RunMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)
TestRunMachine = RunMachine.TestCase
