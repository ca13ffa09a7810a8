"""Queues of waiting sequences by lane, and which lane is next."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from .ordered_queue import OrderedQueue
from .policies.guard import Guard
from .request import Sequence

Place = tuple[float, int]
Queue = OrderedQueue[Place, Sequence]

_SLACK: Final = 64


class Lanes:
    """Push, removal and finding the next lane are O(log n), amortised, whatever the number of lanes.

    The policy's lane keys change as lanes are served. The heap holds what a key was when last asked; the lane at the
    head is asked again, and goes back with what it says when that has risen. So only lanes whose key has changed cost
    anything. A lane that has become open since the last look is opened then, for the policy must hear first of what
    the others were served.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._queues: dict[str, Queue] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._opened: dict[str, int] = {}
        self._new: dict[str, None] = {}
        self._openings = 0

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (sequence for queue in self._queues.values() for sequence in queue)

    def push(self, sequence: Sequence) -> None:
        queue = self._queues.get(sequence.lane)
        if queue is None:
            queue = self._queues[sequence.lane] = OrderedQueue()
            if self._guard.has_lanes:
                self._new[sequence.lane] = None
        queue.push((sequence.key, sequence.order), sequence)

    def remove(self, sequence: Sequence) -> None:
        lane = sequence.lane
        queue = self._queues[lane]
        queue.remove((sequence.key, sequence.order))
        if not self._guard.has_lanes or len(queue):
            return
        del self._queues[lane]
        if lane in self._new:
            del self._new[lane]
        else:
            del self._opened[lane]
            self._guard.closes(lane)

    def next(self) -> Queue | None:
        """The queue of the lane that is served next; None when all are empty, or the policy failed."""
        if not self._guard.has_lanes:
            queue = self._queues.get("")
            return queue if queue is not None and len(queue) else None
        for lane in self._new:
            self._open(lane)
        self._new.clear()
        first = self._first()
        return None if first is None else self._queues[first]

    def _open(self, lane: str) -> None:
        first = self._first()
        self._guard.opens(lane, None if first is None else self._heap[0][0])
        self._openings += 1
        self._opened[lane] = self._openings
        heapq.heappush(self._heap, (self._guard.lane_key(lane) or 0.0, self._openings, lane))
        if len(self._heap) > 2 * len(self._opened) + _SLACK:
            self._heap = [entry for entry in self._heap if self._opened.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def _first(self) -> str | None:
        """The open lane of the least key. Each is asked at most once, whatever the policy makes up."""
        for _ in range(len(self._heap)):
            head = self._head()
            if head is None:
                return None
            key, number, lane = head
            fresh = self._guard.lane_key(lane)
            if fresh is None or fresh <= key:
                break
            heapq.heapreplace(self._heap, (fresh, number, lane))
        head = self._head()
        return None if head is None else head[2]

    def _head(self) -> tuple[float, int, str] | None:
        """The first entry that is of an open lane; those before it are thrown away."""
        heap, opened = self._heap, self._opened
        while heap and opened.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        return heap[0] if heap else None
