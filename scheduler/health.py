"""Health is progress: what the service has to say of itself, from what is in flight and what was lost."""

from __future__ import annotations

import msgspec

from treadle.transport.messages import Health

from .lifecycle import GroupLost
from .step import Step
from .supervisor import Supervisor


def judge(
    state: str,
    detail: str,
    steps: int,
    oldest: Step | None,
    missing: list[int],
    lost: GroupLost | None,
    lost_at: float,
    supervisor: Supervisor | None,
    now: float,
) -> Health:
    """What the service says of itself. oldest: the oldest step in flight. missing: ranks that have not answered it."""
    health = Health(
        state=state,
        detail=detail,
        step=steps,
        step_age=now - oldest.began_at if oldest is not None else 0.0,
        spare=supervisor.spare if supervisor is not None else "",
    )
    if state == "recovering" and lost is not None and supervisor is not None:
        return _degraded(health, lost, supervisor, now - lost_at)
    if state == "starting" and supervisor is not None:
        return msgspec.structs.replace(health, progress=supervisor.progress)
    if state in ("ready", "draining") and oldest is not None and oldest.late:
        return _stuck(health, oldest, missing, now)
    return health


def _stuck(health: Health, oldest: Step, missing: list[int], now: float) -> Health:
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


def _degraded(health: Health, lost: GroupLost, supervisor: Supervisor, seconds: float) -> Health:
    """A lost group is being replaced, since `seconds`. Where the next one did not start, both are said."""
    failure = supervisor.failure
    return msgspec.structs.replace(
        health,
        state="degraded",
        detail=f"a restart failed: {failure}; before that: {health.detail}" if failure else health.detail,
        rank=lost.rank,
        at_step=lost.step,
        doing=lost.doing,
        cause=lost.cause,
        seconds=seconds,
        progress=supervisor.progress,
        attempt=supervisor.attempts,
    )
