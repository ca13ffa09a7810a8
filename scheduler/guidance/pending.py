"""When the masks of a step can be made: as soon as all tokens before its samples are committed.

Step N + 1 is planned while N runs (docs/scheduler.md), so a guided row of it does not know its last token yet, and no
grammar can say what may follow. Until N's result is applied the step stands here.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from treadle.scheduler.planner import Flight
from treadle.scheduler.request import Sequence
from treadle.scheduler.running import Running
from treadle.transport.codec import Int32, pack, unpack


@dataclass(frozen=True, slots=True)
class GuidedSample:
    """A guided row's next sample. output: its committed output, int32, which is what the sample follows; read it at
    once, for it shows the row's own memory."""

    sequence: Sequence
    output: Int32


@dataclass(frozen=True, slots=True)
class MasksDue:
    """samples: one for each guided row of the plan, in its order; None where nobody wants the token any more."""

    step: int
    samples: list[GuidedSample | None]


@dataclass(frozen=True, slots=True)
class _Place:
    """length: tokens that there are before the sample. admission: of the row when it was planned."""

    row: int
    admission: int
    sequence: Sequence
    length: int


class PendingMasks:
    """Steps in flight whose masks nobody was asked for yet, oldest first."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self._steps: deque[tuple[int, list[_Place]]] = deque()

    def enter(self, flight: Flight) -> bytes:
        """A step was planned; returns the rows that wait for masks, for the plan."""
        arrays = self._running.rows
        sampled, admissions = flight.sampled()
        which = np.flatnonzero(arrays.guided[sampled])
        if not which.size:
            return b""
        rows = sampled[which]
        lengths = (arrays.frontier[rows] - 1).tolist()
        owners: list[Sequence] = arrays.owner[rows].tolist()
        places = zip(rows.tolist(), admissions[which].tolist(), owners, lengths, strict=True)
        self._steps.append((flight.step, [_Place(*place) for place in places]))
        return pack(rows)

    def take(self) -> list[MasksDue]:
        """The steps that are ready. A step waits for those before it: they bring the tokens."""
        due: list[MasksDue] = []
        while self._steps:
            step, places = self._steps[0]
            samples: list[GuidedSample | None] = []
            for place in places:
                tokens = self._tokens(place)
                if tokens is None:
                    samples.append(None)
                elif tokens.size < place.length:
                    return due
                else:
                    output = tokens[place.sequence.request.prompt_len : place.length]
                    samples.append(GuidedSample(place.sequence, output))
            self._steps.popleft()
            due.append(MasksDue(step, samples))
        return due

    def drop(self, step: int) -> None:
        """The step's result is there: whatever it waited for is of no use."""
        while self._steps and self._steps[0][0] <= step:
            self._steps.popleft()

    def clear(self) -> None:
        self._steps.clear()

    def _tokens(self, place: _Place) -> Int32 | None:
        """The committed tokens of whoever was planned there. One that was preempted meanwhile still gets its token; of
        one that has ended it is discarded."""
        arrays = self._running.rows
        if arrays.admission[place.row] == place.admission:
            return arrays.tokens[place.row, : arrays.known[place.row]]
        if self._running.parked.get(place.admission) is place.sequence:
            return unpack(place.sequence.tokens)
        return None
