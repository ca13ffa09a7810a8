"""When a step must be finished: learned from the steps before it, and generous.

A hang should be found in seconds where steps take milliseconds, and a slow machine must never be taken for a dead one.
So the deadline is many times the slowest recent step of about the same size, never below `floor` and never above
`ceiling`, which also holds for whatever has not been seen yet. Too early costs a restart, too late some seconds.
"""

from __future__ import annotations

_FACTOR = 20.0
_FADING = 0.98
_ENOUGH = 8


class StepDeadline:
    """floor, ceiling: seconds. Sizes are classes of computed tokens, each twice the last.

    The longer context of later steps is covered by the factor: a class follows what its steps take as they grow.
    """

    def __init__(self, floor: float, ceiling: float) -> None:
        self._floor = min(floor, ceiling)
        self._ceiling = ceiling
        self._slowest: dict[int, float] = {}
        self._seen: dict[int, int] = {}
        self._steps = 0

    def seconds(self, tokens: int) -> float:
        """How long a step that computes so many tokens may take.

        A greater step takes at least as long, so the nearest class that is known, from its own upwards, is a bound.
        """
        wanted = tokens.bit_length()
        known = [size for size, count in self._seen.items() if size >= wanted and count >= _ENOUGH]
        if self._steps < _ENOUGH or not known:
            return self._ceiling
        return min(max(_FACTOR * self._slowest[min(known)], self._floor), self._ceiling)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step is done. The slowest one fades, so that one hiccup does not count for ever."""
        size = tokens.bit_length()
        self._slowest[size] = max(seconds, self._slowest.get(size, 0.0) * _FADING)
        self._seen[size] = self._seen.get(size, 0) + 1
        self._steps += 1

    def restart(self) -> None:
        """Another engine group: its first steps may compile, allocate and page in, and get the ceiling again."""
        self._steps = 0
