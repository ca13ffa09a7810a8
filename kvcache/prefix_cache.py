"""Automatic prefix cache: a trie over full blocks of tokens, kept in one dict.

The key of a block is (uid of the block before it, bytes of its tokens). A uid is a number given to each published
content and never given again, so a key names the *whole* prefix although it holds one block of tokens: the hash of a
key is a chained hash. A dict compares keys after it has compared hashes, so the tokens themselves are verified all
the way up, and a collision costs a comparison instead of serving another request's state. The root of the trie is the
cache salt: requests with different salts cannot meet, and salts leave nothing behind when their blocks are evicted.
(docs/decisions/002-prefix-cache-trie.md has the alternatives.)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from .block_pool import BlockId, BlockPool, Label
from .invariant import require

Parent = int | str
"""Where a block hangs: the uid of the block before it, or the salt for the first block."""

TOKEN_BYTES = 4


class PrefixCache:
    """Finds and publishes blocks of a pool by content. It owns no block: references are taken and given in the pool."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._nodes: dict[Label, BlockId] = {}
        self._uids = [0] * num_blocks
        self._next_uid = 1
        self._width = block_size * TOKEN_BYTES
        self._block_type = np.dtype((np.void, self._width))
        self.pool = BlockPool(num_blocks, on_evict=self._nodes.pop)

    def __len__(self) -> int:
        """Published blocks, owned or cached."""
        return len(self._nodes)

    def clear(self) -> None:
        """The memory behind the blocks is gone: forget everything, owners included."""
        self._nodes.clear()
        self.pool.clear()

    def match(self, salt: str, tokens: bytes, max_blocks: int) -> tuple[list[BlockId], Parent]:
        """The longest published prefix of `tokens` (int32 bytes), at most `max_blocks` blocks, and where it ends.

        The blocks are not referenced yet: `pool.share` them before anything else is allocated.
        """
        nodes, uids = self._nodes, self._uids
        parent: Parent = salt
        blocks: list[BlockId] = []
        if not max_blocks or (salt, tokens[: self._width]) not in nodes:
            return blocks, parent
        with suppress(KeyError):
            for content in self._split(tokens, max_blocks):
                block = nodes[parent, content]
                blocks.append(block)
                parent = uids[block]
        return blocks, parent

    def publish(self, parent: Parent, tokens: bytes, blocks: Sequence[BlockId]) -> Parent:
        """Makes consecutive full blocks findable below `parent`; returns the parent for what follows.

        tokens: int32 bytes, `len(blocks) * block_size` tokens. The caller owns a reference on each block and keeps
        it. Content that is published already stays where it is: the caller's copy remains private, and what
        follows hangs on the published one, so that equal texts meet again in one path.
        """
        setdefault, uids, labels, uid = self._nodes.setdefault, self._uids, self.pool.labels, self._next_uid
        for content, block in zip(self._split(tokens, len(blocks)), blocks, strict=True):
            key = (parent, content)
            there = setdefault(key, block)
            if there == block:
                labels[block] = key
                uids[block] = parent = uid
                uid += 1
            else:
                parent = uids[there]
        self._next_uid = uid
        return parent

    def publish_each(self, parents: Sequence[Parent], tokens: bytes, blocks: Sequence[BlockId]) -> list[Parent]:
        """`publish` for blocks of different sequences, one each; returns what follows hangs on, one each."""
        setdefault, uids, labels, uid = self._nodes.setdefault, self._uids, self.pool.labels, self._next_uid
        following: list[Parent] = []
        for parent, content, block in zip(parents, self._split(tokens, len(blocks)), blocks, strict=True):
            key = (parent, content)
            there = setdefault(key, block)
            if there == block:
                labels[block] = key
                uids[block] = uid
                uid += 1
            following.append(uids[there])
        self._next_uid = uid
        return following

    def check(self) -> None:
        """Raises CoreInvariantError unless labels and trie say the same."""
        self.pool.check()
        labelled = {label: block for block, label in enumerate(self.pool.labels) if label is not None}
        require(labelled == self._nodes, "labels of the pool and nodes of the trie differ")
        require(all(len(tokens) == self._width for _, tokens in self._nodes), "a node is not one full block")
        uids = [self._uids[block] for block in self._nodes.values()]
        require(len(set(uids)) == len(uids), "two published blocks share a uid")

    def _split(self, tokens: bytes, count: int) -> list[bytes]:
        """The first `count` blocks of it. numpy's void type cuts four times faster than slices."""
        parts: list[bytes] = np.frombuffer(tokens, self._block_type, count).tolist()
        return parts
