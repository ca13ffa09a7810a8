"""The gateway that `treadle serve --http` runs beside it, in a process of its own.

Its work (JSON, text, sockets) then takes no time from the scheduler, which would wait for the interpreter lock in one
process with it. It speaks to the service like any other client.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys

import msgspec

from treadle.errors import ConfigError

from .auth import ApiKeys
from .extra import check_extra
from .settings import GatewaySettings, check_settings, listen, url_of

logger = logging.getLogger("treadle")
_AGAIN_SECONDS = 1.0
_MOST_SECONDS = 30.0
_MOST_STARTS = 3
_KILL_SECONDS = 3.0


class GatewayChild:
    """Holds the socket, so that the address is taken (or refused) before a model is loaded.

    endpoint: to connect to. server_key: public, for tcp. `ready` is set when a gateway has reached the service. A
    process that ends by itself is started again, after pauses that grow. Raises ConfigError and EndpointInUse here.
    """

    def __init__(self, address: str, endpoint: str, server_key: str | None, settings: GatewaySettings) -> None:
        check_extra()
        check_settings(settings)
        ApiKeys.load(settings.api_keys)  # the child reads them for itself; what is wrong with them is said here
        self._endpoint = reachable(endpoint)
        self._server_key = server_key
        self._settings = settings
        self._listener = listen(address)
        self.ready = asyncio.Event()
        self.url = url_of(self._listener)

    async def run(self) -> None:
        """Keeps a gateway running until cancelled; then ends it. Raises TreadleError when none has ever come up."""
        lifeline, held = os.pipe()  # nobody writes: it closes when we end, however we end
        report, reporting = os.pipe()
        loop = asyncio.get_running_loop()
        loop.add_reader(report, self._reported, report)
        pause, starts = _AGAIN_SECONDS, 0
        try:
            while True:
                began = loop.time()
                try:
                    process = self._spawn(lifeline, reporting)
                except OSError as error:  # too many processes or descriptors: later perhaps
                    logger.error("the HTTP gateway cannot be started, and is tried again: %s", error)
                    await asyncio.sleep(_AGAIN_SECONDS)
                    continue
                starts += 1
                try:
                    await _ended(process.pid)
                finally:
                    await asyncio.shield(self._end(process))
                if starts == _MOST_STARTS and not self.ready.is_set():
                    raise ConfigError(f"the HTTP gateway ended with code {process.returncode}, {starts} times in a row")
                logger.error("the HTTP gateway ended with code %d; starting it again", process.returncode)
                if loop.time() - began > _MOST_SECONDS:
                    pause = _AGAIN_SECONDS
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_SECONDS)
        finally:
            loop.remove_reader(report)
            self._listener.close()
            for descriptor in (lifeline, held, report, reporting):
                os.close(descriptor)

    def _reported(self, report: int) -> None:
        os.read(report, 1)
        self.ready.set()

    def _spawn(self, lifeline: int, reporting: int) -> subprocess.Popen[bytes]:
        descriptors = [lifeline, reporting, self._listener.fileno()]
        command = [sys.executable, "-P", "-m", "treadle", "gateway", self._endpoint]
        command += ["--child", *map(str, descriptors), "--options", msgspec.json.encode(self._settings).decode()]
        if self._server_key is not None:
            command.append(f"--server-key={self._server_key}")
        null = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=null, stdout=null, pass_fds=descriptors, start_new_session=True)

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.terminate()
            try:
                async with asyncio.timeout(self._settings.stop_seconds + _KILL_SECONDS):
                    await _ended(process.pid)
            except TimeoutError:
                process.kill()
        process.wait()


async def _ended(pid: int) -> None:
    """Waits for a child of ours that has not been waited for."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    while True:
        try:
            descriptor = os.pidfd_open(pid)
            break
        except OSError as error:  # no descriptor is free
            logger.error("the HTTP gateway is not watched: %s", error)
            await asyncio.sleep(_AGAIN_SECONDS)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def reachable(endpoint: str) -> str:
    """An endpoint to connect to, where the server's own may mean all addresses of the machine."""
    for every in ("tcp://0.0.0.0:", "tcp://*:", "tcp://[::]:"):
        if endpoint.startswith(every):
            return "tcp://127.0.0.1:" + endpoint.removeprefix(every)
    return endpoint


def tell(report: int) -> None:
    """What the child says to its parent when it has reached the service."""
    os.write(report, b"!")


def inherited(descriptor: int) -> socket.socket:
    """The listening socket of the parent, in the child."""
    return socket.socket(fileno=descriptor)
