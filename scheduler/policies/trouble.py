"""What a service says of a policy that fails: in its log, though not at every step, and of its health."""

from __future__ import annotations

import logging

from treadle.errors import PolicyFailed

logger = logging.getLogger("treadle")
_SECONDS = 10.0


class PolicyLog:
    """told: failures that have been logged."""

    def __init__(self) -> None:
        self.told = 0
        self._told_at = -_SECONDS

    def tell(self, errors: int, last: PolicyFailed | None, now: float) -> None:
        """errors: failures up to now, other than `told`. Too soon after the last time they wait for a later call."""
        if now < self._told_at + _SECONDS:
            return
        self._told_at = now
        logger.error("%s (%d new)", last, errors - self.told)
        self.told = errors


def in_words(errors: int, last: PolicyFailed | None) -> str:
    """Empty for a policy that has not failed."""
    return f"{errors} times; the last: {last}" if last is not None else ""
