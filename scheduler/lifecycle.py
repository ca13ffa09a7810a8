"""What happens to engine groups, as typed events: for logs, for health, and for whoever embeds the service."""

from __future__ import annotations

from typing import Literal

import msgspec

Cause = Literal["exit", "raised", "hang", "disagreed", "malformed", "unreachable"]
"""exit: the process ended. raised: it said what went wrong. hang: a step was not finished by its deadline.
disagreed: its digest is another. malformed: an answer that cannot be. unreachable: its socket was lost."""

_BACKOFF_SECONDS = (0.0, 0.5, 2.0, 5.0)


class GroupLost(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An engine group ended. rank: -1 when nobody knows. step: -1 between steps. doing: of that step, in words.

    serving: False for a spare group, whose loss nobody notices.
    """

    group: int
    rank: int
    step: int
    cause: Cause
    doing: str
    detail: str
    serving: bool = True

    def __str__(self) -> str:
        what = "engine group" if self.serving else "spare engine group"
        return f"{what} {self.group} lost: rank {self.rank}, {self.doing}: {self.cause}: {self.detail}"


class GroupReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An engine group serves. seconds: since its predecessor was lost, 0 for the first. spare: it stood ready."""

    group: int
    seconds: float
    attempts: int
    spare: bool

    def __str__(self) -> str:
        how = ", which stood by," if self.spare else ""
        return f"engine group {self.group}{how} is ready {self.seconds:.2f} s after the loss of the last"


class GaveUp(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """No engine group will come any more."""

    attempts: int
    detail: str

    def __str__(self) -> str:
        return f"gave up after {self.attempts} restarts: {self.detail}"


ServiceEvent = GroupLost | GroupReady | GaveUp


def backoff(attempt: int) -> float:
    """Seconds to wait before restart `attempt` (0 is the first)."""
    return _BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)]
