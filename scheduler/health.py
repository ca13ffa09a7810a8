"""Health is progress: what the service has to say of itself, from what is in flight and what was lost."""

from __future__ import annotations

import msgspec

from treadle.transport.messages import Health

from .lifecycle import GroupLost
from .step import Step
from .supervisor import Supervisor


def stuck(health: Health, oldest: Step, missing: list[int], now: float) -> Health:
    """A step has used up half of its time."""
    return msgspec.structs.replace(
        health,
        state="stuck",
        detail=f"ranks {missing} have not answered",
        rank=missing[0] if missing else -1,
        at_step=oldest.number,
        doing=oldest.doing,
        seconds=now - oldest.began_at,
    )


def degraded(health: Health, lost: GroupLost, supervisor: Supervisor, seconds: float) -> Health:
    """A lost group is being replaced, since `seconds`."""
    return msgspec.structs.replace(
        health,
        state="degraded",
        rank=lost.rank,
        at_step=lost.step,
        doing=lost.doing,
        cause=lost.cause,
        seconds=seconds,
        progress=supervisor.phase,
        attempt=supervisor.attempts,
    )
