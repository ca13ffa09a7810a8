"""Automatic prefix cache: a trie over full blocks of tokens, one dict per published block.

The dict of a block says which blocks follow it, by the bytes of their tokens. It is a new one whenever the block is
published with new content, so it stands for the *whole* prefix although each step of a walk looks at one block of
tokens. A dict compares keys after it has compared hashes, so the tokens themselves are verified all the way up, and a
collision costs a comparison instead of serving another request's state. First blocks of sequences are in one dict, by
cache salt and tokens: requests with different salts cannot meet, and salts leave nothing behind when their blocks are
evicted. (docs/decisions/002-prefix-cache-trie.md has the alternatives.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .block_pool import BlockId, BlockPool, Label
from .invariant import require

Node = dict[Label, BlockId]
"""The blocks that follow a block."""

Parent = Node | str
"""Where a block hangs: the node of the block before it, or the salt for the first block."""

TOKEN_BYTES = 4


class PrefixCache:
    """Finds and publishes blocks of a pool by content. It owns no block: references are taken and given in the pool.

    A published block has its key as its label in the pool, the node that it is in as its `_home`, and a node of its
    own, `_nodes[block]`. Those behind an evicted block keep its node alive and cannot be reached any more.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._width = block_size * TOKEN_BYTES
        self._block_type = np.dtype((np.void, self._width))
        self._first: Node = {}
        self._homes: list[Node] = [{}] * num_blocks
        self._nodes: list[Node] = [{}] * num_blocks
        self.pool = BlockPool(num_blocks, on_evict=self._forget)

    def __len__(self) -> int:
        """Published blocks, owned or cached."""
        return sum(label is not None for label in self.pool.labels)

    def clear(self) -> None:
        """The memory behind the blocks is gone: forget everything, owners included."""
        self._first.clear()
        self.pool.clear()

    def match(self, salt: str, tokens: bytes, max_blocks: int) -> tuple[list[BlockId], Parent]:
        """The longest published prefix of `tokens` (int32 bytes), at most `max_blocks` blocks, and where it ends.

        The blocks are not referenced yet: `pool.share` them before anything else is allocated.
        """
        block = self._first.get((salt, tokens[: self._width])) if max_blocks else None
        if block is None:
            return [], salt
        nodes = self._nodes
        blocks, node = [block], nodes[block]
        append = blocks.append
        try:
            for content in self._split(tokens, max_blocks)[1:]:
                block = node[content]
                append(block)
                node = nodes[block]
        except KeyError:
            return blocks, node
        return blocks, node

    def publish(self, parent: Parent, tokens: bytes, blocks: Sequence[BlockId]) -> Parent:
        """Makes consecutive full blocks findable below `parent`; returns the parent for what follows.

        tokens: int32 bytes, `len(blocks) * block_size` tokens. The caller owns a reference on each block and keeps
        it. Content that is published already stays where it is: the caller's copy remains private, and what
        follows hangs on the published one, so that equal texts meet again in one path.
        """
        if not blocks:
            return parent
        contents = self._split(tokens, len(blocks))
        keys: list[Label] = [*contents]
        if isinstance(parent, str):
            node, keys[0] = self._first, (parent, contents[0])
        else:
            node = parent
        nodes, homes, labels = self._nodes, self._homes, self.pool.labels
        pairs = zip(keys, blocks, strict=True)
        for key, block in pairs:
            there = node.setdefault(key, block)
            if there == block:
                break
            node = nodes[there]
        else:
            return node
        labels[block], homes[block] = key, node
        for key, following in pairs:  # nothing can be there behind a new block
            nodes[block] = node = {key: following}
            labels[following], homes[following] = key, node
            block = following
        nodes[block] = node = {}
        return node

    def publish_each(self, parents: Sequence[Parent], tokens: bytes, blocks: Sequence[BlockId]) -> list[Parent]:
        """`publish` for blocks of different sequences, one each; returns what follows hangs on, one each."""
        first, nodes, homes, labels = self._first, self._nodes, self._homes, self.pool.labels
        following: list[Parent] = []
        for parent, content, block in zip(parents, self._split(tokens, len(blocks)), blocks, strict=True):
            node, key = (first, (parent, content)) if isinstance(parent, str) else (parent, content)
            there = node.setdefault(key, block)
            if there == block:
                labels[block] = key
                homes[block] = node
                nodes[block] = {}
            following.append(nodes[there])
        return following

    def check(self) -> None:
        """Raises CoreInvariantError unless labels and trie say the same."""
        self.pool.check()
        labels = self.pool.labels
        published = [BlockId(block) for block, label in enumerate(labels) if label is not None]
        homes = {id(home): home for home in [self._first, *(self._homes[block] for block in published)]}
        found = {block: (key, id(home)) for home in homes.values() for key, block in home.items()}
        expected = {block: (labels[block], id(self._homes[block])) for block in published}
        require(found == expected, "labels of the pool and nodes of the trie differ")
        first = [block for block in published if isinstance(labels[block], tuple)]
        require(all(self._homes[block] is self._first for block in first), "a salt inside of a sequence")
        require(len({id(self._nodes[block]) for block in published}) == len(published), "two blocks share a node")

    def _forget(self, blocks: Sequence[BlockId]) -> None:
        homes, labels = self._homes, self.pool.labels
        for block in blocks:
            del homes[block][labels[block]]  # type: ignore[arg-type]  # what can be evicted has a label

    def _split(self, tokens: bytes, count: int) -> list[bytes]:
        """The first `count` blocks of it. numpy's void type cuts four times faster than slices."""
        parts: list[bytes] = np.frombuffer(tokens, self._block_type, count).tolist()
        return parts
