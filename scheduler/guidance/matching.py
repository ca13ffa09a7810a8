"""What a grammar library has to do for us. `llg` does it with llguidance; tests have a small one of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from treadle.transport.masks import Words
from treadle.transport.messages import Guided


class Matcher(Protocol):
    """Where one output stands in its grammar. Used by one thread at a time."""


class Grammar(Protocol):
    """A compiled grammar. Any number of outputs may begin with it, as long as it is not spent."""

    @property
    def spent(self) -> bool:
        """Whether it is of no use for further outputs; those that have begun go on."""
        ...

    def start(self) -> Matcher:
        """A matcher before the first token."""
        ...


class Advance(msgspec.Struct, frozen=True, eq=False):
    """Tokens that a matcher has not seen yet, and the row of the masks that what may follow them goes to."""

    matcher: Matcher
    tokens: Sequence[int]
    row: int


class Matching(Protocol):
    """Compiles grammars and moves matchers, on threads: several may compile at once, one at a time calls `advance`."""

    vocab_size: int

    def compile(self, guided: Guided) -> Grammar:
        """Raises InvalidParameter for what is not a grammar, is too large, or allows nothing."""
        ...

    def advance(self, work: Sequence[Advance], words: Words, begun: Callable[[], None]) -> dict[int, str]:
        """Feeds each matcher its tokens and writes what it allows next into words, uint32 [rows, words].

        begun: to be called once what is left is mostly not Python's. Returns why, by row, for matchers that cannot go
        on; their words mean nothing.
        """
        ...
