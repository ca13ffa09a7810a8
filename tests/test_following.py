"""Sequences that follow runs: the cache is told nothing, and everybody finds what would be there if it were."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from treadle.kvcache import Blocks, Parent, PrefixCache
from treadle.transport.codec import pack

SIZE = 2
BLOCKS = 16


@dataclass
class Held:
    """A sequence that runs. shown: how many of its tokens the cache may ask for. follows: it is asked."""

    text: list[int]
    table: list[int]
    place: Parent
    follows: bool = False


class Side:
    """A cache and the sequences that use it. lazy: they follow runs where they may; else they publish every block."""

    def __init__(self, lazy: bool) -> None:
        self.cache = PrefixCache(BLOCKS, SIZE, host_blocks=2)
        self.cache.writers = self if lazy else None
        self.held: dict[int, Held] = {}
        self.asked = 0

    def filled(self, writer: int, first: int) -> tuple[bytes, Blocks]:
        self.asked += 1
        held = self.held[writer]
        return pack(held.text[first * SIZE :]), np.array(held.table[first:], np.int64)

    def dismissed(self, writer: int, place: Parent) -> None:
        self.held[writer].place, self.held[writer].follows = place, False

    def begin(self, number: int, text: list[int]) -> list[int] | None:
        hit, place = self.cache.match("", pack(text), len(text) // SIZE)
        self.cache.pool.share(hit[hit < BLOCKS])
        table = self.cache.fetch(hit, len(text) // SIZE - hit.size)
        if table is None:
            self.cache.pool.release(hit[hit < BLOCKS])
            return None
        self.cache.join(place)
        self.held[number] = Held(text, table.tolist(), place)
        self._publish(number, hit.size)
        return table.tolist()

    def go_on(self, number: int, tokens: list[int]) -> list[int] | None:
        block = self.cache.pool.allocate(1)
        if block is None:
            return None
        held = self.held[number]
        held.table += block.tolist()
        held.text += tokens
        if not held.follows:
            self._publish(number, len(held.table) - 1)
            held.follows = self.cache.follow(held.place, number)
        return block.tolist()

    def end(self, number: int, fault: bool) -> None:
        held = self.held[number]
        table = np.array(held.table, np.int64)
        if fault:
            self.cache.catch_up(held.place)
            self.cache.pool.withdraw(table)
        self.cache.leave(held.place, number)
        self.cache.pool.release(table)
        del self.held[number]

    def found(self, text: list[int]) -> list[int]:
        return self.cache.match("", pack(text), len(text) // SIZE)[0].tolist()

    def _publish(self, number: int, first: int) -> None:
        held = self.held[number]
        old = held.place
        held.place = self.cache.publish(old, pack(held.text[first * SIZE :]), np.array(held.table[first:], np.int64))
        self.cache.leave(old, number)
        self.cache.join(held.place)


class FollowingMachine(RuleBasedStateMachine):
    """The same events with and without following: the same blocks at every look, whatever lies between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.sides = Side(lazy=True), Side(lazy=False)
        self.numbers = 0

    def _same(self, answers: list[list[int] | None]) -> None:
        assert answers[0] == answers[1]
        lazy, eager = (side.cache.host.take_copies() for side in self.sides)
        assert lazy == eager

    def _chosen(self, pick: int) -> int:
        return sorted(self.sides[0].held)[pick % len(self.sides[0].held)]

    @rule(zeros=st.integers(0, 3), ones=st.integers(0, 2), saving=st.booleans())
    def begin(self, zeros: int, ones: int, saving: bool) -> None:
        self.numbers += 1
        text = [0, 0] * zeros + [1, 1] * ones + [0, 0]
        for side in self.sides:
            side.cache.saving = saving
        self._same([side.begin(self.numbers, list(text)) for side in self.sides])

    @precondition(lambda self: self.sides[0].held)
    @rule(pick=st.integers(0, 20), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def go_on(self, pick: int, tokens: list[int]) -> None:
        number = self._chosen(pick)
        for token in tokens:
            self._same([side.go_on(number, [token, token]) for side in self.sides])

    @precondition(lambda self: self.sides[0].held)
    @rule(pick=st.integers(0, 20), other=st.integers(0, 1))
    def look(self, pick: int, other: int) -> None:
        text = self.sides[0].held[self._chosen(pick)].text
        self._same([side.found([*text, other, other]) for side in self.sides])

    @precondition(lambda self: self.sides[0].held)
    @rule(pick=st.integers(0, 20), fault=st.booleans())
    def end(self, pick: int, fault: bool) -> None:
        number = self._chosen(pick)
        for side in self.sides:
            side.end(number, fault)

    @invariant()
    def holds(self) -> None:
        for side in self.sides:
            side.cache.check()
        pools = [side.cache.pool for side in self.sides]
        assert pools[0].available == pools[1].available and pools[0].cached == pools[1].cached

    def teardown(self) -> None:
        for number in sorted(self.sides[0].held):
            text = self.sides[0].held[number].text
            self._same([side.found(text) for side in self.sides])


FollowingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
TestFollowing = FollowingMachine.TestCase


def test_who_is_alone_at_the_end_of_a_run_is_asked_only_when_somebody_looks() -> None:
    side = Side(lazy=True)
    side.begin(1, [1, 1])
    for token in range(5):
        side.go_on(1, [token, token])
    table = side.held[1].table
    assert side.held[1].follows and side.asked == 0 and len(side.cache) == 2
    assert side.found(side.held[1].text) == table and side.asked == 1
    assert side.found([9, 9]) == [] and side.asked == 1


def test_two_who_go_on_from_the_same_place_publish_by_themselves_until_they_part() -> None:
    side = Side(lazy=True)
    side.begin(1, [1, 1])
    side.go_on(1, [2, 2])
    side.begin(2, [1, 1, 2, 2])
    assert not side.held[1].follows
    for number in (1, 2):
        side.go_on(number, [3, 3])
        assert not side.held[number].follows
    side.go_on(1, [4, 4])
    side.go_on(2, [5, 5])
    assert side.held[2].follows and side.found([1, 1, 2, 2, 3, 3, 5, 5])[3:] == side.held[2].table[3:]
