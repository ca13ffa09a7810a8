"""A run: consecutive published blocks between which nothing branches off. The prefix cache is a trie of them."""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np

Key = bytes | tuple[str, bytes]
"""The tokens of the first block of a run; where that begins sequences, with their salt."""

Home = dict[Key, "Run"]
"""The runs that follow a run, or that begin sequences."""

TOKEN_BYTES: Final = 4
NOBODY: Final = -1


class Run:
    """start, end: how many blocks are before it, and with it. tokens: int32 bytes, `width` for each block. blocks:
    their numbers.

    key, home: where it is found. before: the run that it follows. after: the runs that follow it; None as long as it is
    open, that is, may be lengthened where it stands. A run of which something was taken away is not open any more, so
    a place behind its end never comes to stand for something else.

    users: sequences that run and have their place in it, or in a part that was split off it. writer: the one that is
    asked for what has come behind its end (`PrefixCache.follow`), or NOBODY; an open run only, that has no other user.
    """

    __slots__ = ("_found", "after", "before", "blocks", "end", "home", "key", "start", "tokens", "users", "writer")

    def __init__(
        self, start: int, key: Key, home: Home, before: Run | None, tokens: bytes | bytearray, blocks: array[int]
    ) -> None:
        self.start = start
        self.key = key
        self.home = home
        self.before = before
        self.after: Home | None = None
        self.end = start + len(blocks)
        self.tokens = bytearray(tokens)
        self.blocks = blocks
        self.users = 0
        self.writer = NOBODY
        self._found = 0
        home[key] = self

    def lengthen(self, tokens: bytes, blocks: bytes) -> None:
        """More blocks at its end; it must be open."""
        self.blocks.frombytes(blocks)
        self.tokens += tokens
        self.end = self.start + len(self.blocks)

    def index(self, block: int) -> int:
        """How many of its blocks are before this one. Whoever asks for many asks in their order, or backwards, and each
        is found beside the one before it."""
        blocks, last = self.blocks, self._found
        for near in (last + 1, last - 1, last):
            if 0 <= near < len(blocks) and blocks[near] == block:
                self._found = near
                return near
        self._found = blocks.index(block)  # ValueError: it is not there
        return self._found

    def equal(self, index: int, tokens: bytes, at: int, count: int, width: int) -> int:
        """How many of `count` blocks from `index` on have the same tokens as those from block `at` of `tokens` on."""
        whole = count == len(self.blocks)
        mine = self.tokens if whole else self.tokens[index * width : (index + count) * width]
        if tokens.startswith(mine, at * width):
            return count
        others = tokens[at * width : (at + count) * width]
        differ = np.frombuffer(mine, np.int32) != np.frombuffer(others, np.int32)
        return int(differ.argmax()) * TOKEN_BYTES // width

    def split(self, index: int, width: int) -> Run:
        """Its first `index` blocks, as a run of their own that this one, with the rest, follows."""
        head = Run(self.start, self.key, self.home, self.before, self.tokens[: index * width], self.blocks[:index])
        del self.tokens[: index * width], self.blocks[:index]
        self.start, self.key = head.end, bytes(self.tokens[:width])
        self.home = head.after = {self.key: self}
        self.before = head
        return head

    def shorten(self, count: int, width: int) -> None:
        """Its last blocks are gone, and what follows cannot be reached any more. Without blocks it leaves the trie."""
        left = len(self.blocks) - count
        del self.tokens[left * width :], self.blocks[left:]
        self.end = self.start + left
        self.after = {}
        if not left:
            del self.home[self.key]

    def tail(self, index: int, width: int) -> Run:
        """What is behind the block at `index`, as a run that nothing leads to. `shorten` must follow."""
        at = index + 1
        tokens = self.tokens[at * width :]
        rest = Run(self.start + at, bytes(tokens[:width]), {}, None, tokens, self.blocks[at:])
        rest.after = self.after
        return rest
