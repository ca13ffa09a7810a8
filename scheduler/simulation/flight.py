"""A step of the simulator between its plan and its result."""

from __future__ import annotations

import msgspec

from treadle.scheduler.request import Sequence


class TimedFlight(msgspec.Struct, frozen=True, gc=False):
    """ends: when the step is over. started: who got a row by it and has no token yet."""

    step: int
    tokens: bytes
    decode_rows: int
    ends: float
    started: list[Sequence]
