"""How fast requests end, for the estimate of when there will be room again."""

from __future__ import annotations

from collections import deque
from typing import Final

_RECENT: Final = 64
_MIN_RETRY, _MAX_RETRY, _UNKNOWN_RETRY = 0.05, 60.0, 1.0


class Rate:
    """The last ends: when, and of how many prompt tokens."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._tokens = 0

    def note(self, now: float, tokens: int) -> None:
        if len(self._ends) == _RECENT:
            self._tokens -= self._ends[0][1]
        self._ends.append((now, tokens))
        self._tokens += tokens

    def seconds(self, requests: int, tokens: int, now: float) -> float:
        """Until so many requests and so many tokens have gone, at the rate of the last few; 0.05 to 60."""
        if len(self._ends) < 2 or now <= self._ends[0][0]:
            return _UNKNOWN_RETRY
        elapsed = now - self._ends[0][0]
        seconds = max(requests, 1) * elapsed / len(self._ends)
        if tokens > 0:
            seconds = max(seconds, tokens * elapsed / max(1, self._tokens))
        return min(max(seconds, _MIN_RETRY), _MAX_RETRY)
