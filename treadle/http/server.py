"""The gateway on a socket: uvicorn, as a guest in whatever program runs it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Self

import uvicorn
from starlette.types import ASGIApp

from treadle.frontend import Frontend

from .app import make_app
from .auth import ApiKeys
from .link import Link
from .settings import GatewaySettings, check_settings, listen, url_of
from .viewers import Viewers

_KEEP_ALIVE_SECONDS = 60


class HttpServer:
    """Serves an open `LLM` or `Client` on the running event loop; the scheduler has a thread or process of its own.

    ```
    async with LLM("smollm2-135m") as llm, HttpServer(llm, "127.0.0.1:8000") as server:
        print(server.url)
        await server.wait()
    ```

    Sets no signal handler and no logging. Raises ConfigError and EndpointInUse here.
    """

    def __init__(
        self, service: Frontend | Link, listener: str | socket.socket, settings: GatewaySettings | None = None
    ) -> None:
        self._settings = settings if settings is not None else GatewaySettings()
        check_settings(self._settings)
        self._keys = ApiKeys.load(self._settings.api_keys)
        self._service = service
        self._listener = listen(listener) if isinstance(listener, str) else listener
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None
        self._viewers: Viewers | None = None
        self.url = url_of(self._listener)

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    async def start(self) -> None:
        link = self._service if isinstance(self._service, Link) else await Link.to(self._service)
        self._viewers = Viewers(link, self._settings.model_names)
        app = make_app(link, self._settings, self._keys, self._viewers)
        self._server = _Uvicorn(app, self._settings.stop_seconds)
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._listener]))
        listening = asyncio.ensure_future(self._server.listening.wait())
        await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            self._task.result()

    async def wait(self) -> None:
        """Until somebody stops it."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Takes no more connections, lets open requests end for `stop_seconds`, then ends them."""
        if self._viewers is not None:
            self._viewers.close()
        if self._server is not None and self._task is not None:
            self._server.stop()
            await self._task
        self._listener.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Uvicorn(uvicorn.Server):
    """Without signal handlers, and without uvicorn's tick ten times a second: it sleeps until it is told to stop."""

    def __init__(self, app: ASGIApp, stop_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(stop_seconds)),
        )
        super().__init__(config)
        self.listening = asyncio.Event()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        self.listening.set()
        await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
