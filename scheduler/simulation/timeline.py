"""The state of a replica at regular times, never more than a few hundred of them however long it runs."""

from __future__ import annotations

import msgspec

_FIRST_WIDTH = 1 / 64
_MOST = 512


class Moment(msgspec.Struct, array_like=True, frozen=True):
    """running, waiting: sequences. blocks: owned by running ones. The others are counts since the beginning."""

    running: int
    waiting: int
    blocks: int
    generated: int
    preemptions: int


class Timeline:
    """`due` is when the next moment is wanted. When there are too many, every second one goes and the width doubles.

    Widths are a power of two times 1/64 s, so that the timelines of replicas can be laid on each other.
    """

    def __init__(self) -> None:
        self.width = self.due = _FIRST_WIDTH
        self.moments: list[Moment] = []

    def add(self, now: float, moment: Moment) -> None:
        """The state from the last moment until `now`, where it was due before."""
        while self.due <= now:
            self.moments.append(moment)
            if len(self.moments) == _MOST:
                self.moments = self.moments[1::2]
                self.width *= 2
            self.due = (len(self.moments) + 1) * self.width

    def at_width(self, width: float) -> list[Moment]:
        step = round(width / self.width)
        return self.moments[step - 1 :: step]
