"""`treadle serve`: one service on a ZeroMQ endpoint, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from treadle.engine import lifeline
from treadle.errors import ServiceClosed, TreadleError
from treadle.scheduler.client_server import ClientServer
from treadle.scheduler.options import ServiceOptions
from treadle.scheduler.service import Service
from treadle.transport.endpoints import ServerKeys, check_server, ipc_path
from treadle.transport.messages import TokenizerInfo

from .facts import Located, load_tokenizer, locate
from .http.child import GatewayChild
from .http.settings import GatewaySettings
from .loop_thread import new_event_loop
from .server_process import StartReport

logger = logging.getLogger("treadle")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `treadle serve` was asked to do.

    parent: file descriptors (lifeline, report) when an `LLM` started us. http: "HOST:PORT" of a gateway beside us.
    """

    model: str
    endpoint: str
    options: ServiceOptions
    keys: ServerKeys | None = None
    parent: tuple[int, int] | None = None
    http: str | None = None
    gateway: GatewaySettings = field(default_factory=GatewaySettings)


def run(settings: ServeSettings, announce: Callable[[str], None]) -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit code; raises TreadleError when it cannot start."""
    path = ipc_path(settings.endpoint)
    if settings.parent is not None:
        lifeline.watch(settings.parent[0], [path.parent] if path is not None else [])
    loop = new_event_loop()
    try:
        return loop.run_until_complete(_serve(settings, announce))
    except TreadleError as error:
        _report(settings, StartReport(error.code, str(error)))
        raise
    finally:
        loop.close()


async def _serve(settings: ServeSettings, announce: Callable[[str], None]) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    check_server(settings.endpoint, settings.keys)  # a bad endpoint should be said before a model is fetched
    tasks = _Tasks()
    try:
        http = _start_gateway(settings, tasks)
        stopping = tasks.start(stop.wait())
        locating = tasks.start(asyncio.to_thread(locate, settings.model))
        if await tasks.first(locating, stopping) is stopping:
            return 0
        return await _serve_model(settings, locating.result(), stopping, tasks, announce, http)
    finally:
        await tasks.end()


async def _serve_model(
    settings: ServeSettings,
    located: Located,
    stopping: asyncio.Task[Any],
    tasks: _Tasks,
    announce: Callable[[str], None],
    http: GatewayChild | None,
) -> int:
    path = ipc_path(settings.endpoint)
    reading = tasks.start(asyncio.to_thread(_tokenizer_info, located.path))

    def info() -> TokenizerInfo | None:
        if not reading.done():
            raise ServiceClosed("the service is starting")
        return reading.result()

    service = Service(located.facts, settings.options, info, [path] if path is not None else [])
    private = settings.parent is not None
    server = ClientServer(service, settings.endpoint, settings.keys, private=private)
    try:
        starting = tasks.start(service.start())
        if await tasks.first(starting, stopping) is stopping:
            return 0
        starting.result()
        await reading
        announce(settings.endpoint)
        _report(settings, StartReport())
        if http is not None and await tasks.first(tasks.start(http.ready.wait()), stopping) is not stopping:
            announce(http.url)
        failed = tasks.start(service.failed.wait())
        return 1 if await tasks.first(stopping, failed) is failed else 0
    finally:
        server.close()
        await service.close()


def _start_gateway(settings: ServeSettings, tasks: _Tasks) -> GatewayChild | None:
    """Its address is taken, or refused, before a model is loaded."""
    if settings.http is None:
        return None
    key = settings.keys.public if settings.keys is not None else None
    child = GatewayChild(settings.http, settings.endpoint, key, settings.gateway)
    tasks.start(child.run())
    return child


def _tokenizer_info(path: Path) -> TokenizerInfo | None:
    tokenizer = load_tokenizer(path)
    return tokenizer.to_info() if tokenizer is not None else None


class _Tasks:
    """What runs beside each other while serving; `end` leaves none behind."""

    def __init__(self) -> None:
        self._all: list[asyncio.Task[Any]] = []

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(coroutine)
        self._all.append(task)
        return task

    async def first(self, *tasks: asyncio.Task[Any]) -> asyncio.Task[Any]:
        """The first of them that is done; it is left to the caller to look at its result."""
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task.done())

    async def end(self) -> None:
        for task in self._all:
            task.cancel()
        await asyncio.gather(*self._all, return_exceptions=True)


def _report(settings: ServeSettings, report: StartReport) -> None:
    """Tells the parent, once; a second report goes nowhere, since the first closed the pipe."""
    if settings.parent is None:
        return
    try:
        os.write(settings.parent[1], msgspec.json.encode(report))
        os.close(settings.parent[1])
    except OSError:
        logger.debug("the parent has its report already")
