"""What happened in a stretch of time: a recording of steps, rows and ranks."""

from __future__ import annotations

import msgspec
from msgspec import field

from .base import Message


class RankTimes(msgspec.Struct, array_like=True, frozen=True):
    """Of one rank in one step, in microseconds."""

    rank: int
    began: int
    forward: int
    sample: int


class StepTimes(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One step. Times in microseconds of the machine's monotonic clock: its plan was begun, ready and out, its results
    were back and applied, its tokens began to be delivered, and were.

    uses, counts: int32, of each row that it computes, which of the timeline's uses that is and how many tokens. chunks:
    those that are prefills; parts: those of them that end before the last known token, and sample nothing.
    """

    number: int
    tokens: int
    plan: int
    ready: int
    out: int
    back: int = 0
    applied: int = 0
    deliver: int = 0
    delivered: int = 0
    ranks: list[RankTimes] = field(default_factory=list)
    uses: bytes
    counts: bytes
    chunks: bytes
    parts: bytes


class RowUse(msgspec.Struct, array_like=True, frozen=True):
    """One continuation in one row, without a break. how: "" while it lasts; "preempted", "lost", or its finish."""

    row: int
    request: str
    continuation: int
    prompt_tokens: int
    began: int
    ended: int = 0
    how: str = ""


class Timeline(Message, frozen=True, kw_only=True):
    """What happened between `began` and `ended`. losses: of engine groups. full: later steps had no room."""

    id: str = ""
    began: int
    ended: int
    steps: list[StepTimes]
    uses: list[RowUse]
    losses: list[int]
    full: bool
