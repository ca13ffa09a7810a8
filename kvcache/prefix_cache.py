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
        get, uids, width = self._nodes.get, self._uids, self._width
        parent: Parent = salt
        blocks: list[BlockId] = []
        for start in range(0, max_blocks * width, width):
            block = get((parent, tokens[start : start + width]))
            if block is None:
                break
            blocks.append(block)
            parent = uids[block]
        return blocks, parent

    def publish(self, parent: Parent, tokens: bytes, blocks: Sequence[BlockId]) -> Parent:
        """Makes consecutive full blocks findable below `parent`; returns the parent for what follows.

        tokens: int32 bytes, `len(blocks) * block_size` tokens. The caller owns a reference on each block and keeps
        it. Content that is published already stays where it is: the caller's copy remains private, and what
        follows hangs on the published one, so that equal texts meet again in one path.
        """
        setdefault, uids, labels, width = self._nodes.setdefault, self._uids, self.pool.labels, self._width
        start = 0
        for block in blocks:
            key = (parent, tokens[start : start + width])
            start += width
            there = setdefault(key, block)
            if there == block:
                labels[block] = key
                uids[block] = self._next_uid
                self._next_uid += 1
            parent = uids[there]
        return parent

    def publish_each(self, parents: Sequence[Parent], tokens: bytes, blocks: Sequence[BlockId]) -> list[Parent]:
        """`publish` for blocks of different sequences, one each; returns what follows hangs on, one each."""
        setdefault, uids, labels, width = self._nodes.setdefault, self._uids, self.pool.labels, self._width
        start = 0
        following: list[Parent] = []
        for parent, block in zip(parents, blocks, strict=True):
            key = (parent, tokens[start : start + width])
            start += width
            there = setdefault(key, block)
            if there == block:
                labels[block] = key
                uids[block] = self._next_uid
                self._next_uid += 1
            following.append(uids[there])
        return following

    def check(self) -> None:
        """Raises CoreInvariantError unless labels and trie say the same."""
        self.pool.check()
        labelled = {label: block for block, label in enumerate(self.pool.labels) if label is not None}
        require(labelled == self._nodes, "labels of the pool and nodes of the trie differ")
        require(all(len(tokens) == self._width for _, tokens in self._nodes), "a node is not one full block")
        uids = [self._uids[block] for block in self._nodes.values()]
        require(len(set(uids)) == len(uids), "two published blocks share a uid")
