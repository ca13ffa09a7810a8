"""The clock that everything on the service's loop reads: its timers go by it, too."""

from __future__ import annotations

import asyncio


def loop_time() -> float:
    """Seconds, of the running loop."""
    return asyncio.get_running_loop().time()
