"""Prototypes of one grammar that share nothing, so that several threads can work on its rows at once.

A matcher is a copy of a prototype, and copies share the prototype's lexer behind a lock: of rows with one prototype
only one moves at a time, however many threads there are. So a grammar with many rows is compiled again, beside the loop
and the masks, and its rows are spread over what came of it. To change to another prototype, a row feeds it the tokens
that it has seen. A prototype that no row uses any more is let go, all but the first.
"""

from __future__ import annotations

import logging
import threading
import weakref
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

logger = logging.getLogger("treadle")
ROWS_EACH = 4
"""With fewer rows to a prototype, each of them learns alone what the others have learned already."""
_DEAR_SECONDS = 0.5
"""A grammar that takes longer to compile is compiled once: a program that ends waits for what is being built."""
_MOVED_TOKENS = 256
"""In one step, of all rows of a grammar that move: feeding them holds Python's lock."""


class Copyable(Protocol):
    def deep_copy(self) -> Self: ...

    def consume_tokens(self, sampled_tokens: list[int]) -> bool: ...


M = TypeVar("M", bound=Copyable)


@dataclass(eq=False)  # no slots: Python 3.12 leaves the one for weak references out where a class is generic
class Replica(Generic[M]):
    """A prototype; whoever holds a replica has it kept."""

    prototype: M


@dataclass(eq=False)
class Row(Generic[M]):
    """One output's matcher, and all tokens that it has seen. Before its first step it has none."""

    replicas: Replicas[M]
    tokens: array[int] = field(default_factory=lambda: array("i"))
    replica: Replica[M] | None = None
    matcher: M | None = None

    def change(self, replica: Replica[M]) -> M:
        """Goes on with a copy of this prototype."""
        self.replica, self.matcher = replica, replica.prototype.deep_copy()
        if self.tokens:
            self.matcher.consume_tokens(self.tokens.tolist())
        return self.matcher


class Builder:
    """A thread that builds, while there is something to build: one at a time, and no step waits for it.

    It is no daemon. Python's end would take its lock from a daemon for ever, and llguidance's code, which gives it up
    while it builds, dies of that with the whole program. So Python waits for this thread, which builds nothing more
    once the main thread has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._running = False

    def ask(self, job: Callable[[], None]) -> bool:
        """Whether it will run: the system may have no thread for it."""
        with self._lock:
            self._jobs.append(job)
            if not self._running:
                try:
                    threading.Thread(target=self._run, name="treadle-replicas", daemon=False).start()
                except RuntimeError:
                    self._jobs.clear()
                    return False
                self._running = True
            return True

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = False
                    return
                job = self._jobs.popleft()
            job()


class Replicas(Generic[M]):
    """Of one grammar. `spread` is called by one thread at a time; what it has built is built on the builder's.

    build: another prototype that shares nothing with the first. seconds: how long that takes. most: so many at once.
    """

    def __init__(self, first: M, build: Callable[[], M], seconds: float, most: int, builder: Builder) -> None:
        self._first = Replica(first)
        self._build = build
        self._most = most if seconds <= _DEAR_SECONDS else 1
        self._builder = builder
        self._others: list[weakref.ref[Replica[M]]] = []
        self._ready: deque[Replica[M]] = deque()
        self._building = False
        self.failed = False
        """Whether a row's matcher failed: what its copies share may be used up for all of them."""

    def start(self) -> Row[M]:
        return Row(self)

    def spread(self, rows: Sequence[Row[M]]) -> None:
        """Gives each row of a step a matcher. Some rows move, so that in the end no prototype has many more than
        another."""
        held: dict[Replica[M], list[Row[M]]] = {replica: [] for replica in self._kept()}
        fresh: list[Row[M]] = []
        for row in rows:
            (fresh if row.replica is None else held[row.replica]).append(row)
        for row in fresh:
            replica = min(held, key=lambda each: len(held[each]))
            row.change(replica)
            held[replica].append(row)
        self._even(held)
        missing = min(self._most, -(-len(rows) // ROWS_EACH)) - len(held)
        fullest = max(held.values(), key=len)
        # Else there would be nobody to move there, who would have it kept.
        movable = min(len(row.tokens) for row in fullest) <= _MOVED_TOKENS // 2
        if missing > 0 and movable and not self._building:
            self._building, one = True, weakref.ref(rows[-1])
            if not self._builder.ask(lambda: self._grow(missing, one)):
                self._building = False

    def _kept(self) -> list[Replica[M]]:
        """Those that there are. What has just been built is kept by the rows that move there, or not at all."""
        found = [replica for ref in self._others if (replica := ref()) is not None]
        with suppress(IndexError):  # the builder may clear it at any time
            while True:
                found.append(self._ready.popleft())
        self._others = [weakref.ref(replica) for replica in found]
        return [self._first, *found]

    def _even(self, held: dict[Replica[M], list[Row[M]]]) -> None:
        left = _MOVED_TOKENS
        while len(held) > 1:
            fullest = max(held.values(), key=len)
            emptiest = min(held, key=lambda replica: len(held[replica]))
            if len(fullest) - len(held[emptiest]) < 2:
                return
            row = min(fullest, key=lambda each: len(each.tokens))
            left -= len(row.tokens)
            if left < 0:
                return
            fullest.remove(row)
            row.change(emptiest)
            held[emptiest].append(row)

    def _grow(self, missing: int, one: weakref.ref[Row[M]]) -> None:
        """one: of the rows that want it; when it has ended, so may they all have."""
        try:
            for _ in range(missing):
                if one() is None or not threading.main_thread().is_alive():
                    self._ready.clear()
                    return
                self._ready.append(Replica(self._build()))
        except BaseException:  # whatever a library does; it has been built before, and the rows have that
            logger.exception("a grammar could not be compiled again")
            self._most = 1
        finally:
            self._building = False


def spread(rows: Sequence[Row[M]]) -> list[M]:
    """The matchers of a step's rows, of any grammars, each where it works beside as few others as can be."""
    grammars: defaultdict[Replicas[M], list[Row[M]]] = defaultdict(list)
    for row in rows:
        grammars[row.replicas].append(row)
    for replicas, some in grammars.items():
        replicas.spread(some)
    return [row.matcher for row in rows if row.matcher is not None]
