"""Virtual time: what happens next."""

from __future__ import annotations

import heapq
from enum import IntEnum


class Kind(IntEnum):
    """What happens at one instant happens in this order: a result makes room before an arrival asks for it."""

    RESULT = 0
    ARRIVAL = 1
    DEADLINE = 2


class EventHeap:
    """Events of one replica, earliest first; equal ones in the order in which they were put in."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int]] = []
        self._serial = 0

    def __bool__(self) -> bool:
        return bool(self._heap)

    def push(self, time: float, kind: Kind) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (time, kind, self._serial))

    def pop(self) -> tuple[float, int]:
        time, kind, _ = heapq.heappop(self._heap)
        return time, kind
