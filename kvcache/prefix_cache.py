"""Automatic prefix cache: a trie over full blocks of tokens, one dict per published block.

The dict of a block says which blocks follow it, by the bytes of their tokens. It is a new one whenever the block is
published with new content, so it stands for the *whole* prefix although each step of a walk looks at one block of
tokens. A dict compares keys after it has compared hashes, so the tokens themselves are verified all the way up, and a
collision costs a comparison instead of serving another request's state. First blocks of sequences are in one dict, by
cache salt and tokens: requests with different salts cannot meet, and salts leave nothing behind when their blocks are
evicted. (docs/decisions/002-prefix-cache-trie.md has the alternatives.)

What the device gives up may move to host memory (`host_tier.py`). The trie then names a host block in its place, with
the same node, so all that hangs behind it is still found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .block_pool import BlockId, BlockPool, Label
from .host_tier import HostTier
from .invariant import require

Node = dict[Label, BlockId]
"""The blocks that follow a block. Numbers of host blocks begin where those of the device end."""

Parent = Node | str
"""Where a block hangs: the node of the block before it, or the salt for the first block."""

TOKEN_BYTES = 4


class PrefixCache:
    """Finds and publishes blocks of a pool by content. It owns no block: references are taken and given in the pool.

    A published block has its key as its label in the pool, the node that it is in as its `_home`, and a node of its
    own, `_nodes[block]`. Those behind an evicted block keep its node alive and cannot be reached any more.

    host: the second tier, of `host_blocks` blocks. saving: whether blocks that are evicted now move there; those that
    `want` has named do in any case.
    """

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int = 0) -> None:
        self._width = block_size * TOKEN_BYTES
        self._block_type = np.dtype((np.void, self._width))
        self._device = num_blocks
        self._first: Node = {}
        self._homes: list[Node] = [{}] * (num_blocks + host_blocks)
        self._nodes: list[Node] = [{}] * (num_blocks + host_blocks)
        self._wanted: set[BlockId] = set()
        self.saving = False
        self.pool = BlockPool(num_blocks, on_evict=self._give_up, on_withdraw=self._forget)
        self.host = HostTier(num_blocks, host_blocks, on_evict=self._forget_host)

    def __len__(self) -> int:
        """Published blocks: owned, cached, or in host memory."""
        return sum(label is not None for label in self.pool.labels) + len(self.host.kept)

    def clear(self) -> None:
        """The memory behind the blocks is gone: forget everything, owners included."""
        self._first.clear()
        self._wanted.clear()
        self.pool.clear()
        self.host.clear()

    def match(self, salt: str, tokens: bytes, max_blocks: int) -> tuple[list[BlockId], Parent]:
        """The longest published prefix of `tokens` (int32 bytes), at most `max_blocks` blocks, and where it ends.

        The blocks are not referenced yet: `pool.share` those of the device before anything else is allocated, and
        `fetch` the others.
        """
        block = self._first.get((salt, tokens[: self._width])) if max_blocks else None
        if block is None:
            return [], salt
        nodes = self._nodes
        blocks, node = [block], nodes[block]
        append = blocks.append
        try:
            for content in self.split(tokens, max_blocks)[1:]:
                block = node[content]
                append(block)
                node = nodes[block]
        except KeyError:
            return blocks, node
        return blocks, node

    def publish(self, parent: Parent, contents: Sequence[bytes], blocks: Sequence[BlockId]) -> Parent:
        """Makes consecutive full blocks findable below `parent`; returns the parent for what follows.

        contents: the tokens of each, int32 bytes. The caller owns a reference on each block and keeps it. Content that
        is published already stays where it is: the caller's copy remains private, and what follows hangs on the
        published one, so that equal texts meet again in one path. Where the published one is in host memory, the
        caller's takes its place.
        """
        if not blocks:
            return parent
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
            if there >= self._device:
                self._come_back(node, key, there, block)
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

    def publish_each(
        self, parents: Sequence[Parent], contents: Sequence[bytes], blocks: Sequence[BlockId]
    ) -> list[Parent]:
        """`publish` for blocks of different sequences, one each; returns what follows hangs on, one each."""
        first, nodes, homes, labels = self._first, self._nodes, self._homes, self.pool.labels
        following: list[Parent] = []
        for parent, content, block in zip(parents, contents, blocks, strict=True):
            node, key = (first, (parent, content)) if isinstance(parent, str) else (parent, content)
            there = node.setdefault(key, block)
            if there == block:
                labels[block] = key
                homes[block] = node
                nodes[block] = {}
            elif there >= self._device:
                self._come_back(node, key, there, block)
            following.append(nodes[there])
        return following

    # ── the second tier ──

    def in_host(self, blocks: Sequence[BlockId]) -> int:
        """How many of a hit's blocks are in host memory."""
        return sum(block >= self._device for block in blocks) if self.host.kept else 0

    def on_device(self, hit: Sequence[BlockId]) -> list[BlockId]:
        """The leading blocks of a hit up to the first that is in host memory."""
        first = next((i for i, block in enumerate(hit) if block >= self._device), len(hit))
        return list(hit[:first])

    def end_of(self, hit: Sequence[BlockId], salt: str) -> Parent:
        """Where what follows the blocks of a hit hangs."""
        return self._nodes[hit[-1]] if hit else salt

    def want(self, blocks: Sequence[BlockId]) -> None:
        """Published blocks that are to move to host memory, and not to be lost, when they are evicted."""
        self._wanted.update(blocks)

    def fetch(self, hit: Sequence[BlockId], fresh: int) -> list[BlockId] | None:
        """The block table of a hit and `fresh` blocks behind it; None, and nothing taken, if too few are available.

        Blocks in host memory are replaced by device blocks to which the plan in the making copies them. The caller has
        shared the others, and owns one reference on each block of the table.
        """
        host, device = self.host, self._device
        away = [block for block in hit if block >= device]
        if len(away) + fresh > self.pool.available:
            return None
        labels = [host.hold(place) for place in away]  # before anything is evicted, which may need places
        blocks = self.pool.allocate(len(away) + fresh) or []
        for place, label, block in zip(away, labels, blocks, strict=False):
            self._settle(self._homes[place], label, place, block)
            host.arrive(place, block)
        back = iter(blocks)
        table = [next(back) if block >= device else block for block in hit]
        return table + blocks[len(away) :]

    def _come_back(self, home: Node, label: Label, place: BlockId, block: BlockId) -> None:
        """Somebody has computed again what is in host memory."""
        self._settle(home, label, place, block)
        self.host.drop(place)

    def _settle(self, home: Node, label: Label, place: BlockId, block: BlockId) -> None:
        """A device block stands in the trie where a host block stood."""
        home[label] = block
        self.pool.labels[block] = label
        self._homes[block] = home
        self._nodes[block] = self._nodes[place]

    def _give_up(self, blocks: Sequence[BlockId]) -> None:
        """The device needs the blocks for others: their content moves to host memory, or is forgotten."""
        if not self.host.total or not (self.saving or self._wanted):
            self._forget(blocks)
            return
        homes, nodes, labels = self._homes, self._nodes, self.pool.labels
        for block in blocks:
            label = labels[block]
            place = None
            if label is not None and (self.saving or block in self._wanted):
                place = self.host.save(block, label)
            if label is None or place is None:
                self._forget([block])
                continue
            homes[block][label] = place
            homes[place], nodes[place] = homes[block], nodes[block]
            self._wanted.discard(block)

    def _forget_host(self, place: BlockId, label: Label) -> None:
        del self._homes[place][label]

    def check(self) -> None:
        """Raises CoreInvariantError unless labels and trie say the same."""
        self.pool.check()
        self.host.check()
        labels = {block: label for block, label in enumerate(self.pool.labels) if label is not None} | self.host.kept
        published = [BlockId(block) for block in labels]
        require(self._wanted <= set(published), "a block is wanted that holds nothing")
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
        if self._wanted:
            self._wanted.difference_update(blocks)

    def split(self, tokens: bytes, count: int) -> list[bytes]:
        """The first `count` blocks of int32 bytes. numpy's void type cuts four times faster than slices."""
        parts: list[bytes] = np.frombuffer(tokens, self._block_type, count).tolist()
        return parts
