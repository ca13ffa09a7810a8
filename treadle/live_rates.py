"""From two looks at a service to what it did a second in between."""

from __future__ import annotations

import msgspec

from treadle.transport.messages import Live


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """A second, over `seconds`: tokens generated, prompt tokens taken up, requests ended, steps finished."""

    seconds: float
    generated: float
    prompt: float
    requests: float
    steps: float


def rates(before: Live | None, after: Live) -> Rates | None:
    """None where there is nothing to compare: a first look, the same one again, or another start of the service."""
    if before is None or before.incarnation != after.incarnation or after.now <= before.now:
        return None
    seconds, old, new = after.now - before.now, before.stats, after.stats
    return Rates(
        seconds=seconds,
        generated=(new.generated_tokens - old.generated_tokens) / seconds,
        prompt=(new.prompt_tokens - old.prompt_tokens) / seconds,
        requests=(new.finished - old.finished) / seconds,
        steps=(new.step - old.step) / seconds,
    )
