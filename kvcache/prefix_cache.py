"""Automatic prefix cache: a trie over full blocks of tokens, whose nodes are runs of blocks.

A run (`run.py`) is a stretch of blocks that nothing branches off between: its tokens in one buffer, its blocks in
another. What a prompt has in common with it is one comparison of memory, and blocks are published, found and evicted a
run at a time. Where two sequences part, the run is split. Tokens are compared all the way, so there is no hash that
could serve another request's state. First runs of sequences are in one dict, by cache salt and tokens: requests with
different salts cannot meet, and salts leave nothing behind when their blocks are evicted.
(docs/decisions/002-prefix-cache-trie.md has the alternatives.)

What the device gives up may move to host memory (`host_tier.py`). The run then names a host block in its place, so all
that is behind it is still found.
"""

from __future__ import annotations

from array import array
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from .arrays import YES
from .block_pool import BlockId, BlockPool, Blocks
from .host_tier import HostTier
from .invariant import CoreInvariantError, require
from .run import NOBODY, TOKEN_BYTES, Home, Key, Run

Parent = tuple[Run, int] | str
"""Where a block hangs: a run and how many blocks are before it, or the salt for the first block.

It stays true when runs are split: what is before the start of a run is in those before it. Behind the end of a run that
is closed there is nothing any more; what hangs there is not published.
"""

NO_BLOCKS: Final[Blocks] = np.zeros(0, np.int64)
_INT64: Final = np.dtype(np.int64)
_NO_NUMBERS: Final = array("q")


class Writers(Protocol):
    """The sequences that follow runs (`PrefixCache.follow`), by number."""

    def filled(self, writer: int, first: int) -> tuple[bytes, Blocks]:
        """Tokens (int32 bytes) and numbers of its full blocks from number `first` on."""
        ...

    def dismissed(self, writer: int, place: Parent) -> None:
        """It does not follow any more: what it fills from this place on it has to publish itself."""
        ...


class PrefixCache:
    """Finds and publishes blocks of a pool by content. It owns no block: references are taken and given in the pool.

    `_runs` says of a published block in which run it is. Numbers of host blocks begin where those of the device end.

    writers: who is asked for what sequences that follow runs have filled. host: the second tier, of `host_blocks`
    blocks. ahead: as of the pool. saving: whether blocks that are evicted now move there; those that `want` has named
    do in any case.
    """

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int = 0, ahead: int = 0) -> None:
        self._width = block_size * TOKEN_BYTES
        self._device = num_blocks
        self._first: Home = {}
        self._runs: npt.NDArray[np.object_] = np.full(num_blocks + host_blocks, None, np.object_)
        self._one_run: npt.NDArray[np.object_] = np.empty((), np.object_)  # numpy need not find out what it is
        self._wanted: set[int] = set()
        self.saving = False
        self.writers: Writers | None = None
        self.pool = BlockPool(num_blocks, on_evict=self._give_up, on_withdraw=self._forget, ahead=ahead)
        self.host = HostTier(num_blocks, host_blocks, on_evict=self._forget_host)

    def __len__(self) -> int:
        """Published blocks: owned, cached, or in host memory."""
        return int(np.count_nonzero(self.pool.published)) + len(self.host.kept)

    def clear(self) -> None:
        """The memory behind the blocks is gone: forget everything, owners included."""
        self._first.clear()
        self._runs.fill(None)
        self._wanted.clear()
        self.pool.clear()
        self.host.clear()

    def match(self, salt: str, tokens: bytes, max_blocks: int) -> tuple[Blocks, Parent]:
        """The longest published prefix of `tokens` (int32 bytes), at most `max_blocks` blocks, and where it ends.

        The blocks are not referenced yet: `pool.share` those of the device before anything else is allocated, and
        `fetch` the others.
        """
        width = self._width
        run = self._first.get((salt, tokens[:width])) if max_blocks else None
        parent: Parent = salt
        blocks, depth = _NO_NUMBERS, 0
        while run is not None:
            if run.writer != NOBODY:
                self._catch_up(run)
            size = len(run.blocks)
            most = min(size, max_blocks - depth)
            equal = run.equal(0, tokens, depth, most, width)
            found = run.blocks[:equal]
            blocks = blocks + found if depth else found
            depth += equal
            if equal:
                parent = run, depth
            if equal < size or depth == max_blocks or not run.after:
                break
            run = run.after.get(tokens[depth * width : (depth + 1) * width])
        return np.frombuffer(blocks, _INT64) if blocks else NO_BLOCKS, parent

    def publish(self, parent: Parent, tokens: bytes, blocks: Blocks) -> Parent:
        """Makes consecutive full blocks findable below `parent`; returns the parent for what follows.

        tokens: of all of them, int32 bytes. The caller owns a reference on each block and keeps it. Content that
        is published already stays where it is: the caller's copy remains private, and what follows hangs on the
        published one, so that equal texts meet again in one path. Where the published one is in host memory, the
        caller's takes its place. Below a parent that has been evicted all remain private.
        """
        width, count, done = self._width, blocks.size, 0
        run, depth = (None, 0) if isinstance(parent, str) else self._resolve(*parent)
        while done < count:
            if run is not None and run.writer != NOBODY:
                self._catch_up(run)
            if run is not None and depth < run.end:
                index = depth - run.start
                equal = run.equal(index, tokens, done, min(count - done, len(run.blocks) - index), width)
                self._come_back(run, index, blocks[done : done + equal])
                done, depth = done + equal, depth + equal
                if done < count and depth < run.end:
                    run = self._split(run, depth - run.start)
                continue
            if run is not None and depth > run.end:
                break
            content = tokens[done * width : (done + 1) * width]
            key: Key = (parent, content) if isinstance(parent, str) and run is None else content
            home = self._first if run is None else run.after
            following = None if home is None else home.get(key)
            if following is None:
                run = self._add(run, key, tokens[done * width :], blocks[done:])
                return run, run.end
            run = following
        return parent if run is None else (run, depth)

    # ── who writes where ──

    def join(self, place: Parent) -> None:
        """A running sequence has its place here now. Who follows the run publishes by itself again."""
        if not isinstance(place, str):
            run = place[0]
            if run.writer != NOBODY:
                self._dismiss(run)
            run.users += 1

    def leave(self, place: Parent, writer: int) -> None:
        """A running sequence that was in this place is there no longer; what it has filled is published."""
        if not isinstance(place, str):
            run = place[0]
            if run.writer == writer:
                self._catch_up(run)
                run.writer = NOBODY
            run.users -= 1

    def follow(self, place: Parent, writer: int) -> bool:
        """Whether what `writer` fills from this place on needs no publishing: whoever looks at the run asks for it.

        So it is with a sequence that goes on at the end of an open run where nobody else is, which nearly all do. Its
        blocks cost nothing until it ends, or another sequence's tokens have led there. Then they are taken over in one
        operation, and everybody finds what would have been there if each had been published when it was full.
        """
        if isinstance(place, str):
            return False
        run, depth = place
        if depth != run.end or run.after is not None or run.users != 1 or self.writers is None:
            return False
        run.writer = writer
        return True

    def catch_up(self, place: Parent) -> None:
        """Publishes what the writer of the run in this place has filled."""
        if not isinstance(place, str) and place[0].writer != NOBODY:
            self._catch_up(place[0])

    def _catch_up(self, run: Run) -> None:
        writers = self.writers
        if writers is None:
            return
        tokens, blocks = writers.filled(run.writer, run.end)
        if tokens:
            self._lengthen(run, tokens, blocks)

    def _dismiss(self, run: Run) -> None:
        self._catch_up(run)
        writer, run.writer = run.writer, NOBODY
        if self.writers is not None:
            self.writers.dismissed(writer, (run, run.end))

    def content(self, block: int) -> Key | None:
        """The tokens under which a block is found, with the salt if it begins sequences; None if it is not found."""
        run: Run | None = self._runs[block]
        if run is None or not (self.pool.published[block] if block < self._device else block in self.host.kept):
            return None
        index = run.index(block)
        tokens = bytes(run.tokens[index * self._width : (index + 1) * self._width])
        return tokens if index or isinstance(run.key, bytes) else (run.key[0], tokens)

    def depth(self, block: int) -> int:
        """How many blocks are before a published one in the sequences that have it."""
        run = self._run_of(block)
        return run.start + run.index(block)

    # ── the second tier ──

    def in_host(self, blocks: Blocks) -> int:
        """How many of a hit's blocks are in host memory."""
        return int(np.count_nonzero(blocks >= self._device)) if self.host.kept else 0

    def on_device(self, hit: Blocks) -> Blocks:
        """The leading blocks of a hit up to the first that is in host memory."""
        away = hit >= self._device
        return hit[: away.argmax()] if away.any() else hit

    def end_of(self, hit: Blocks, salt: str) -> Parent:
        """Where what follows the blocks of a hit hangs."""
        if not hit.size:
            return salt
        last = hit.item(-1)
        run = self._run_of(last)
        return run, run.start + run.index(last) + 1

    def want(self, blocks: Blocks) -> None:
        """Published blocks that are to move to host memory, and not to be lost, when they are evicted."""
        self._wanted.update(blocks.tolist())

    def fetch(self, hit: Blocks, fresh: int) -> Blocks | None:
        """The block table of a hit and `fresh` blocks behind it; None, and nothing taken, if too few are available.

        Blocks in host memory are replaced by device blocks to which the plan in the making copies them. The caller has
        shared the others, and owns one reference on each block of the table.
        """
        away = hit >= self._device
        places = [BlockId(place) for place in hit[away].tolist()]
        if len(places) + fresh > self.pool.available:
            return None
        for place in places:  # before anything is evicted, which may need places
            self.host.hold(place)
        blocks = self.pool.allocate(len(places) + fresh)
        if blocks is None:
            return None
        for place, block in zip(places, blocks.tolist(), strict=False):
            self._settle(place, block)
            self.host.arrive(place, block)
        table = np.concatenate((hit, blocks[len(places) :]))
        table[: hit.size][away] = blocks[: len(places)]
        return table

    def _come_back(self, run: Run, index: int, blocks: Blocks) -> None:
        """Somebody has computed again what may be in host memory."""
        if not self.host.kept:
            return
        for place, block in zip(run.blocks[index : index + blocks.size], blocks.tolist(), strict=True):
            if place >= self._device:
                self._settle(place, block)
                self.host.drop(BlockId(place))

    def _settle(self, place: int, block: int) -> None:
        """A device block stands in the trie where a host block stood."""
        self._replace(place, block)
        self.pool.published[block] = True

    def _replace(self, old: int, new: int) -> None:
        run = self._run_of(old)
        run.blocks[run.index(old)] = new
        self._runs[new] = run

    def _give_up(self, blocks: Blocks) -> None:
        """The device needs the blocks for others: their content moves to host memory, or is forgotten."""
        if not self.host.total or not (self.saving or self._wanted):
            self._forget(blocks)
            return
        for index, block in enumerate(blocks.tolist()):
            place = self.host.save(block) if self.saving or block in self._wanted else None
            if place is None:
                self._forget(blocks[index : index + 1])
                continue
            self._replace(block, place)
            self._wanted.discard(block)

    def _forget_host(self, place: BlockId) -> None:
        run = self._run_of(place)
        if run.writer != NOBODY:
            self._dismiss(run)
        self._cut(run, run.index(place))

    # ── runs ──

    def _run_of(self, block: int) -> Run:
        """Of a published one."""
        run: Run | None = self._runs[block]
        if run is None:
            raise _in_no_run(block)
        return run

    @staticmethod
    def _resolve(run: Run, depth: int) -> tuple[Run, int]:
        """The run in which a place is, and how many blocks are before it."""
        while depth <= run.start and run.before is not None:
            run = run.before
        return run, depth

    def _add(self, run: Run | None, key: Key, tokens: bytes, blocks: Blocks) -> Run:
        """New blocks behind the end of a run, or at the beginning of sequences."""
        if run is None:
            run = Run(0, key, self._first, None, tokens, array("q", blocks.tobytes()))
        elif run.after is None:
            if run.writer != NOBODY:
                self._dismiss(run)
            self._lengthen(run, tokens, blocks)
            return run
        else:
            run = Run(run.end, key, run.after, run, tokens, array("q", blocks.tobytes()))
        self._note(run, blocks)
        return run

    def _lengthen(self, run: Run, tokens: bytes, blocks: Blocks) -> None:
        run.lengthen(tokens, blocks.tobytes())
        self._note(run, blocks)

    def _note(self, run: Run, blocks: Blocks) -> None:
        """These blocks are in the run now."""
        self._one_run[()] = run
        self._runs[blocks] = self._one_run
        self.pool.published[blocks] = YES

    def _split(self, run: Run, index: int) -> Run:
        head = run.split(index, self._width)
        self._runs[np.frombuffer(head.blocks, np.int64)] = head
        return head

    def _forget(self, blocks: Blocks) -> None:
        """Takes them out of the trie. Nearly always they are the ends of runs, from the last block on."""
        gone, at = array("q", blocks.tobytes()), 0
        size, width, runs = len(gone), self._width, self._runs
        while at < size:
            run: Run | None = runs[gone[at]]
            if run is None:
                raise _in_no_run(gone[at])
            if run.writer != NOBODY:
                self._dismiss(run)
            count = min(len(run.blocks), size - at)
            if gone[at : at + count] != run.blocks[: -count - 1 : -1]:
                count = _ending(run.blocks, gone, at)
            if count:
                run.shorten(count, width)
            else:
                self._cut(run, run.index(gone[at]))
            at += max(count, 1)
        if self._wanted:
            self._wanted.difference_update(gone)

    def _cut(self, run: Run, index: int) -> None:
        """Takes a block out of a run. What is behind it stays published, but nothing leads there any more."""
        behind = len(run.blocks) - index - 1
        if behind:
            rest = run.tail(index, self._width)
            self._runs[np.frombuffer(rest.blocks, np.int64)] = rest
        run.shorten(behind + 1, self._width)

    def check(self) -> None:
        """Raises CoreInvariantError unless pool, host memory and runs say the same.

        What nothing leads to any more is not told from what should be found.
        """
        self.pool.check()
        self.host.check()
        published = [*self.pool.published.nonzero()[0].tolist(), *self.host.kept]
        require(self._wanted <= set(published), "a block is wanted that holds nothing")
        runs = {id(run): run for run in map(self._run_of, published)}
        named = [block for run in runs.values() for block in run.blocks]
        require(sorted(named) == sorted(published), "runs name other blocks than those that are published")
        for run in runs.values():
            self._check_run(run)
        homes: list[tuple[Run | None, int, Home]] = [(None, 0, self._first)]
        for before, start, home in homes:
            for key, run in home.items():
                require(id(run) in runs, "a run that holds nothing can be found")
                require(run.key == key and run.home is home, "a run is found by other tokens than its own")
                require(run.before is before and run.start == start, "a run follows another one")
                if run.after:
                    homes.append((run, run.end, run.after))

    def _check_run(self, run: Run) -> None:
        width, first = self._width, bytes(run.tokens[: self._width])
        key = first if run.start else (run.key[0], first)
        alone = run.after is None and run.users == 1
        require(run.writer == NOBODY or alone, "who follows a run is not alone there, or something else follows, too")
        require(len(run.tokens) == width * len(run.blocks), "tokens and blocks of a run differ")
        require(run.key == key and run.home.get(run.key) is run, "a run is found by other tokens than its own")
        require(all(run is self._runs[block] for block in run.blocks), "a block is in two runs")
        require(run.end == run.start + len(run.blocks), "a run ends elsewhere than behind its blocks")


def _in_no_run(block: int) -> CoreInvariantError:
    return CoreInvariantError(f"block {block} is published and in no run")


def _ending(blocks: array[int], gone: array[int], at: int) -> int:
    """How many of `gone` from `at` on are the last of `blocks`, from the end."""
    most = min(len(blocks), len(gone) - at)
    count = 0
    while count < most and gone[at + count] == blocks[-1 - count]:
        count += 1
    return count
