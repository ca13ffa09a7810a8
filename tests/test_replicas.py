"""Rows of a grammar over its prototypes: even, bounded, and each row with all its tokens."""

from __future__ import annotations

import threading
import weakref

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from treadle.scheduler.guidance.replicas import ROWS_EACH, Builder, Replica, Replicas, Row, spread

from .replicakit import AtOnce, Later, Tokens

MOST = 4


def fed(rows: list[Row[Tokens]], token: int) -> list[Tokens]:
    """A step in which every row gets a token."""
    matchers = spread(rows)
    for row, matcher in zip(rows, matchers, strict=True):
        matcher.consume_tokens([token])
        row.tokens.append(token)
    return matchers


class Spreading(RuleBasedStateMachine):
    """Rows come and go, steps have some of them, and prototypes are built at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.builder = Later()
        self.built: list[weakref.ref[Tokens]] = []
        self.grammars = [Replicas(Tokens(), self._build, 0.0, MOST, self.builder) for _ in range(2)]
        self.rows: list[list[Row[Tokens]]] = [[], []]
        self.token = 0

    def _build(self) -> Tokens:
        made = Tokens()
        self.built.append(weakref.ref(made))
        return made

    @rule(grammar=st.integers(0, 1), number=st.integers(1, 12))
    def come(self, grammar: int, number: int) -> None:
        self.rows[grammar] += [self.grammars[grammar].start() for _ in range(number)]

    @rule(grammar=st.integers(0, 1), keep=st.integers(0, 9), every=st.integers(1, 3))
    def go(self, grammar: int, keep: int, every: int) -> None:
        self.rows[grammar] = [row for place, row in enumerate(self.rows[grammar]) if place % every or place < keep]

    @rule(threads=st.booleans())
    def build(self, threads: bool) -> None:
        self.builder.threads = threads
        self.builder.build()

    @rule(every=st.integers(1, 3), tokens=st.sampled_from([1, 2, 90]))
    def step(self, every: int, tokens: int) -> None:
        rows = [row for rows in self.rows for row in rows[::every]]
        for _ in range(tokens):
            self.token += 1
            for row, matcher in zip(rows, fed(rows, self.token), strict=True):
                assert matcher is row.matcher and matcher.seen == row.tokens.tolist()

    @precondition(lambda self: any(self.rows))
    @rule()
    def settle(self) -> None:
        """With threads and short outputs, rows end up even."""
        self.builder.threads = True
        self.rows = [[grammar.start() for _ in rows] for grammar, rows in zip(self.grammars, self.rows, strict=True)]
        for _ in range(3):
            fed([row for rows in self.rows for row in rows], 0)
            self.builder.build()
        fed([row for rows in self.rows for row in rows], 0)
        for rows in self.rows:
            loads = [sum(row.replica is other.replica for other in rows) for row in rows]
            assert not rows or max(loads) == -(-len(rows) // min(MOST, -(-len(rows) // ROWS_EACH)))

    @invariant()
    def bounded(self) -> None:
        for rows in self.rows:
            assert len({id(row.replica) for row in rows if row.replica is not None}) <= MOST
        alive = sum(ref() is not None for ref in self.built)
        assert alive <= 2 * (2 * MOST - 1), "those of rows that do not step, and those that are ready"


TestSpreading = Spreading.TestCase
TestSpreading.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


def test_a_prototype_that_no_row_uses_is_let_go() -> None:
    built: list[weakref.ref[Tokens]] = []

    def build() -> Tokens:
        made = Tokens()
        built.append(weakref.ref(made))
        return made

    grammar = Replicas(Tokens(), build, 0.0, MOST, AtOnce())
    rows = [grammar.start() for _ in range(3 * ROWS_EACH)]
    fed(rows, 1)
    fed(rows, 2)
    assert len(built) == 2 and len({id(row.replica) for row in rows}) == 3
    rows.clear()
    assert [ref() for ref in built] == [None, None]


def test_long_outputs_stay_where_they_are() -> None:
    """To feed a new matcher all of them would hold up the step."""
    builder = Later()
    grammar = Replicas(Tokens(), Tokens, 0.0, MOST, builder)
    rows = [grammar.start() for _ in range(2 * ROWS_EACH)]
    for token in range(500):
        fed(rows, token)
    assert len(builder.asked) == 1
    builder.build()
    matchers = fed(rows, 0)
    assert fed(rows, 1) == matchers and len({id(row.replica) for row in rows}) == 1
    assert not builder.asked, "nor is another prototype of any use"


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_what_cannot_be_built_again_goes_on_with_one(seconds: float) -> None:
    """Because it fails, or because it takes too long."""
    tried: list[int] = []

    def build() -> Tokens:
        tried.append(1)
        raise ValueError("no")

    grammar = Replicas(Tokens(), build, seconds, MOST, AtOnce())
    rows = [grammar.start() for _ in range(20)]
    for token in range(3):
        fed(rows, token)
    assert len(tried) == (seconds == 0.0) and len({id(row.replica) for row in rows}) == 1


def test_the_builders_thread_ends_when_there_is_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, went, gate = Builder(), threading.Semaphore(0), threading.Event()
    threads: list[threading.Thread] = []

    def job() -> None:
        threads.append(threading.current_thread())
        gate.wait()
        went.release()

    assert builder.ask(job) and builder.ask(job)
    gate.set()
    assert went.acquire(timeout=60) and went.acquire(timeout=60)
    threads[0].join(60)
    assert threads[0] is threads[1] and not threads[0].is_alive()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert not builder.ask(job)
    monkeypatch.undo()
    assert builder.ask(job) and went.acquire(timeout=60)


def test_a_replica_is_compared_by_what_it_is() -> None:
    prototype = Tokens()
    assert Replica(prototype) != Replica(prototype)
