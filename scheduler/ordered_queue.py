"""A priority queue from which anything can be taken out."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

Key = TypeVar("Key", int, tuple[float, int])
Item = TypeVar("Item")

_SLACK: Final = 64


class OrderedQueue(Generic[Key, Item]):
    """Lowest key first; keys are unique. Push and pop are O(log n), removal is O(1) and amortised.

    A removed key stays in the heap until it surfaces, or until such keys are the majority and the heap is rebuilt.
    """

    def __init__(self) -> None:
        self._heap: list[Key] = []
        self._items: dict[Key, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        """In no particular order."""
        return iter(self._items.values())

    def push(self, key: Key, item: Item) -> None:
        self._items[key] = item
        heapq.heappush(self._heap, key)

    def remove(self, key: Key) -> None:
        """Takes it out; a key that is not there is ignored."""
        self._items.pop(key, None)
        if len(self._heap) > 2 * len(self._items) + _SLACK:
            self._heap = list(self._items)
            heapq.heapify(self._heap)

    def smallest(self, count: int) -> list[Item]:
        """The first so many, in order, without taking them out: O(count log count) and what was removed on the way."""
        first = self.first_key()
        if first is None:
            return []
        heap, found = self._heap, list[Item]()
        last, border = None, [(first, 0)]  # a heap's order: an entry's children stand at 2i + 1 and 2i + 2
        while border and len(found) < count:
            key, at = heapq.heappop(border)
            if key in self._items and key != last:  # one that was removed and pushed again is in the heap twice
                found.append(self._items[key])
                last = key
            for child in range(2 * at + 1, min(2 * at + 3, len(heap))):
                heapq.heappush(border, (heap[child], child))
        return found

    def first_key(self) -> Key | None:
        heap, items = self._heap, self._items
        while heap and heap[0] not in items:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def first(self) -> Item | None:
        key = self.first_key()
        return None if key is None else self._items[key]
