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
from treadle.errors import ConfigError, InvalidRequest, ServiceStarting, TreadleError
from treadle.scheduler.client_limits import ClientLimits
from treadle.scheduler.client_server import ClientServer
from treadle.scheduler.engine_group import ENGINE_COMMAND
from treadle.scheduler.options import ServiceOptions
from treadle.scheduler.service import Service
from treadle.transport.endpoints import ServerKeys, check_server, ipc_path
from treadle.transport.messages import ControlMessage, Drain, TokenizerInfo

from .facts import Located, load_tokenizer, locate
from .http.child import GatewayChild
from .http.settings import GatewaySettings
from .loop_thread import new_event_loop
from .notify import Notifier
from .server_process import StartReport
from .settling import settle

logger = logging.getLogger("treadle")
T = TypeVar("T")
_MAX_GRACE = 1e6


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What `treadle serve` was asked to do. parent: file descriptors (lifeline, report) when an `LLM` started us.

    drain_timeout: seconds to finish what runs after the first signal; a second one ends it at once. limits: of each
    client. allowed: public keys of the clients that may connect over tcp, None for all. engine_command: starts a rank.
    http: "HOST:PORT" of a gateway beside us.
    """

    model: str | os.PathLike[str]
    endpoint: str
    options: ServiceOptions
    keys: ServerKeys | None = None
    drain_timeout: float = 30.0
    limits: ClientLimits = ClientLimits()  # noqa: RUF009  # frozen
    allowed: tuple[str, ...] | None = None
    engine_command: tuple[str, ...] = ENGINE_COMMAND
    parent: tuple[int, int] | None = None
    http: str | None = None
    gateway: GatewaySettings = field(default_factory=GatewaySettings)


def run(settings: ServeSettings, announce: Callable[[str], None]) -> int:
    """Serves until it is told to end. Returns the exit code; raises TreadleError when it cannot start."""
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
    end = _End(settings.drain_timeout if settings.parent is None else 0.0)
    heeded = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        heeded.append(signal.SIGHUP)
    for number in heeded:
        loop.add_signal_handler(number, end.signal, number)
    if settings.allowed is not None and ipc_path(settings.endpoint) is not None:
        raise ConfigError(f"--allow is for tcp: {settings.endpoint} is closed to other users anyway")
    check_server(settings.endpoint, settings.keys)  # a bad endpoint should be said before a model is fetched
    tasks = _Tasks()
    try:
        http = _start_gateway(settings, tasks)
        stopping = tasks.start(end.asked.wait())
        locating = tasks.start(asyncio.to_thread(locate, settings.model))
        if await _come(tasks, http, locating, stopping) is stopping:
            return end.early_code
        return await _serve_model(settings, locating.result(), end, stopping, tasks, announce, http)
    finally:
        await tasks.end()


async def _serve_model(
    settings: ServeSettings,
    located: Located,
    end: _End,
    stopping: asyncio.Task[Any],
    tasks: _Tasks,
    announce: Callable[[str], None],
    http: _Gateway | None,
) -> int:
    path = ipc_path(settings.endpoint)
    reading = tasks.start(asyncio.to_thread(_tokenizer_info, located.path))

    def info() -> TokenizerInfo | None:
        if not reading.done():
            raise ServiceStarting("the service is starting")
        return reading.result()

    leftovers = [path] if path is not None else []
    service = Service(located.facts, settings.options, info, leftovers, engine_command=settings.engine_command)
    private = settings.parent is not None

    async def control(message: ControlMessage) -> str:
        if isinstance(message, Drain):
            end.drain(message.grace)
            return "draining"
        other = await asyncio.to_thread(locate, message.model)
        await service.change_weights(other.facts)
        return f"goes on with {other.path}"

    server = ClientServer(
        service,
        settings.endpoint,
        settings.keys,
        private=private,
        control=control,
        limits=settings.limits,
        allowed=settings.allowed,
    )
    try:
        starting = tasks.start(service.start())
        if await _come(tasks, http, starting, stopping) is stopping:
            return end.early_code
        starting.result()
        await reading
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, service.dump, "SIGUSR1")
        settle()
        announce(settings.endpoint)
        _report(settings, StartReport())
        if http is not None:
            coming, failed = tasks.start(http.child.ready.wait()), tasks.start(service.failed.wait())
            if await _come(tasks, http, stopping, failed, coming) is coming:
                announce(http.child.url)
        return await _serve_until_the_end(service, end, stopping, tasks)
    finally:
        server.close()
        await service.close()


async def _come(tasks: _Tasks, http: _Gateway | None, *awaited: asyncio.Task[Any]) -> asyncio.Task[Any]:
    """The first of these. Raises TreadleError where the gateway cannot come up, which makes waiting for them vain."""
    if http is None:
        return await tasks.first(*awaited)
    first = await tasks.first(*awaited, http.running)
    if first is http.running:
        http.running.result()
    return first


async def _serve_until_the_end(service: Service, end: _End, stopping: asyncio.Task[Any], tasks: _Tasks) -> int:
    """The exit code: of a service that was asked to end and has, or has failed."""
    notifier = Notifier()
    notifier.ready()
    tasks.start(notifier.keep_alive())
    failed = tasks.start(service.failed.wait())
    if await tasks.first(stopping, failed) is not failed:
        notifier.stopping()
        await tasks.first(tasks.start(service.drain(end.grace)), tasks.start(end.hurry.wait()), failed)
    return 1 if service.failed.is_set() else 0


def _start_gateway(settings: ServeSettings, tasks: _Tasks) -> _Gateway | None:
    """Its address is taken, or refused, before a model is loaded."""
    if settings.http is None:
        return None
    key = settings.keys.public if settings.keys is not None else None
    child = GatewayChild(settings.http, settings.endpoint, key, settings.gateway)
    return _Gateway(child, tasks.start(child.run()))


def _tokenizer_info(path: Path) -> TokenizerInfo | None:
    tokenizer = load_tokenizer(path)
    return tokenizer.to_info() if tokenizer is not None else None


@dataclass(frozen=True, slots=True)
class _Gateway:
    """running: ends by itself only with an error."""

    child: GatewayChild
    running: asyncio.Task[None]


class _End:
    """How a server is asked to end: by a signal or a message, and once more by a signal if it should be at once."""

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.asked = asyncio.Event()
        self.hurry = asyncio.Event()
        self._signals = 0
        self._interrupted = False

    @property
    def early_code(self) -> int:
        """The exit code of a server that had not begun to serve."""
        return 130 if self._interrupted else 0

    def signal(self, number: int) -> None:
        self._signals += 1
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.asked.set()
        if self._signals > 1 and number != signal.SIGHUP:  # a terminal that closes sends two
            self.hurry.set()

    def drain(self, grace: float) -> None:
        """Raises InvalidRequest."""
        if not 0 <= grace <= _MAX_GRACE:
            raise InvalidRequest(f"grace={grace!r}: allowed is 0 to {_MAX_GRACE:g} seconds")
        if not self.asked.is_set():
            self.grace = grace
            self.asked.set()


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
