"""`treadle top`: from its options to its exit code."""

from __future__ import annotations

import asyncio
import logging

from treadle.errors import ConfigError
from treadle.transport.endpoints import ServerKeys

from .app import TopApp
from .asking import LiveAsker

_INTERVALS = (0.2, 60.0)


def run(endpoint: str, server_key: str | None, keys: ServerKeys | None, patience: float, interval: float) -> int:
    """Until q is pressed. Raises ConfigError, and TreadleError where nobody answers to begin with."""
    low, high = _INTERVALS
    if not low <= interval <= high:
        raise ConfigError(f"--interval {interval!r}: allowed is {low:g} to {high:g} seconds")
    asker = LiveAsker(endpoint, server_key, keys, patience)
    return asyncio.run(_show(asker, interval))


async def _show(asker: LiveAsker, interval: float) -> int:
    try:
        await asker.check()
        logging.disable(logging.CRITICAL)  # the screen is the application's
        app = TopApp(asker.ask, asker.endpoint, interval)
        return await app.run_async() or 0
    finally:
        await asker.close()
