"""What a simulated replica has to tell. It crosses processes, so it is decoded by its types."""

from __future__ import annotations

import msgspec

from .timeline import Moment


class ReplicaResult(msgspec.Struct, array_like=True):
    """first, finish: float64 [requests], seconds from the beginning of the first token and of the end, -1 for never.

    ends: how many requests ended in which way: "length", "deadline", or the code of an error. seconds: when all was
    over. busy: seconds in steps. row_seconds: rows times seconds of the steps that they were in. policy: its name.
    policy_error: the last failure of the policy in words, "" where it never failed; `stats` counts them.
    """

    first: bytes
    finish: bytes
    ends: dict[str, int]
    seconds: float
    steps: int
    busy: float
    row_seconds: float
    between: list[int]
    width: float
    timeline: list[Moment]
    stats: dict[str, int]
    policy: str
    policy_error: str
