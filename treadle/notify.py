"""What systemd is told by a unit of `Type=notify`: that we are ready, stopping, still alive (sd_notify(3))."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping

logger = logging.getLogger("treadle")


class Notifier:
    """Says nothing where nobody listens: without $NOTIFY_SOCKET every method returns at once."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        micros = environment.get("WATCHDOG_USEC", "")
        self._watchdog = int(micros) / 1e6 if ours and micros.isdigit() else 0.0

    def ready(self) -> None:
        self._say("READY=1")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    async def keep_alive(self) -> None:
        """Until cancelled. A loop that no longer turns sends nothing, and the unit is restarted."""
        while self._address and self._watchdog:
            self._say("WATCHDOG=1")
            await asyncio.sleep(self._watchdog / 3)

    def _say(self, state: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
                sender.sendto(state.encode(), self._address)
        except OSError as error:
            logger.warning("systemd was not told %s: %s", state, error.strerror)
