"""Sequences that have no row, in the order in which they will get one."""

from __future__ import annotations

from collections.abc import Iterator

from .ordered_queue import OrderedQueue
from .request import Sequence


class Waiting:
    """By `Sequence.order`, so that a preempted sequence is at the head again without being told so."""

    def __init__(self) -> None:
        self._queue: OrderedQueue[int, Sequence] = OrderedQueue()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def push(self, sequence: Sequence) -> None:
        self._queue.push(sequence.order, sequence)
        self.tokens += sequence.known

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence.order)
        self.tokens -= sequence.known

    def first(self) -> Sequence | None:
        return self._queue.first()

    def extend(self, sequence: Sequence, token: bytes) -> None:
        """A waiting sequence's token came back late: it was in flight when the sequence was preempted."""
        sequence.tokens += token
        self.tokens += 1
