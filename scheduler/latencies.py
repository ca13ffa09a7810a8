"""How long requests wait, for their first token and between tokens, over the last minute.

Only rows that change cost anything: a continuation is noted when it gets its first row, looked at until it has its
first token, and summed up when it ends. Percentiles are computed when somebody asks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from treadle.transport.messages import LiveLatency

from .request import NO_ROW, Output, Sequence
from .rows import Rows

WINDOW_SECONDS = 60.0
_MOST = 4096


class Recent:
    """Values of the last minute, the latest 4096 at most."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=_MOST)

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))

    def percentiles(self, now: float) -> LiveLatency:
        """Nearest rank: the smallest value that at least so many of a hundred do not exceed."""
        values = self._values
        while values and values[0][0] < now - WINDOW_SECONDS:
            values.popleft()
        if not values:
            return LiveLatency()
        ranked = sorted(value for _, value in values)
        p50, p90, p99 = (ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.9, 0.99))
        return LiveLatency(len(ranked), p50, p90, p99)


class Latencies:
    """Times are the loop's, in seconds. wait: from acceptance to the first step. ttft: to the first token.

    tpot: mean time between the tokens after the first, of a continuation that came to its end.
    """

    def __init__(self) -> None:
        self.wait = Recent()
        self.ttft = Recent()
        self.tpot = Recent()
        self._before: dict[Sequence, int] = {}
        self._first: dict[Sequence, tuple[float, int]] = {}

    def __len__(self) -> int:
        """Continuations that are followed."""
        return len(self._before) + len(self._first)

    def started(self, sequences: Iterable[Sequence], now: float) -> None:
        """They have rows in a step that is sent `now`; not for the first time, perhaps."""
        for sequence in sequences:
            if sequence not in self._before and sequence not in self._first:
                self._before[sequence] = sequence.known
                self.wait.add(now - sequence.ticket.arrival, now)

    def applied(self, rows: Rows, now: float) -> None:
        """A step's tokens are committed."""
        for sequence, before in list(self._before.items()):
            if _known(sequence, rows) > before or sequence.finish in ("stop", "length"):
                del self._before[sequence]
                self._first[sequence] = now, before
                self.ttft.add(now - sequence.ticket.arrival, now)

    def ended(self, output: Output, now: float) -> None:
        """Nothing more will come of it."""
        self._before.pop(output.sequence, None)
        first = self._first.pop(output.sequence, None)
        if first is None or output.finish not in ("stop", "length"):
            return
        since, before = first
        more = output.known - before - 1
        if more > 0:
            self.tpot.add((now - since) / more, now)


def _known(sequence: Sequence, rows: Rows) -> int:
    return sequence.known if sequence.row == NO_ROW else int(rows.known[sequence.row])
