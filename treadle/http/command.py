"""`treadle gateway`: HTTP in front of a service that runs elsewhere, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

from treadle.client import Client
from treadle.loop_thread import new_event_loop
from treadle.notify import Notifier
from treadle.settling import settle

from .link import Link
from .server import HttpServer
from .settings import GatewaySettings, is_local, listen

logger = logging.getLogger("treadle")
_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class GatewayCommand:
    """endpoint, server_key: as for `Client`. listener: "HOST:PORT", or a socket that the parent handed over."""

    endpoint: str
    server_key: str | None
    listener: str | socket.socket
    settings: GatewaySettings


def run(command: GatewayCommand, announce: Callable[[str], None]) -> int:
    """Serves until SIGINT or SIGTERM; announces its address when it has reached the service. Raises TreadleError.

    That the service is not there yet is no reason not to start: `/health` says so until it is.
    """
    loop = new_event_loop()
    try:
        return loop.run_until_complete(_serve(command, announce))
    finally:
        loop.close()


async def _serve(command: GatewayCommand, announce: Callable[[str], None]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its comings and goings are ours to tell
    _client(command)  # a bad endpoint should be said at once
    listener = listen(command.listener) if isinstance(command.listener, str) else command.listener
    notifier = Notifier() if isinstance(command.listener, str) else Notifier({})  # a child's parent speaks for it
    link = Link.keep(lambda: _client(command))
    try:
        async with HttpServer(link, listener, command.settings) as server:
            if not server.has_keys and not is_local(listener):
                logger.warning("anybody who reaches %s may use the model: no API keys are set", server.url)
            stopping = loop.create_task(stop.wait())
            reached = loop.create_task(link.reached.wait())
            await asyncio.wait({stopping, reached}, return_when=asyncio.FIRST_COMPLETED)
            if not stop.is_set():
                settle()
                announce(server.url)
                notifier.ready()
            alive = loop.create_task(notifier.keep_alive())
            reached.cancel()
            await stopping
            alive.cancel()
            notifier.stopping()
    finally:
        await link.close()
    return 0


def _client(command: GatewayCommand) -> Client:
    return Client(command.endpoint, server_key=command.server_key, connect_timeout=_CONNECT_SECONDS)
