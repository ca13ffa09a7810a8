"""The scheduler in a process of its own behind the embedded API: `LLM(..., in_process=False)`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

import msgspec

from treadle.errors import EngineStartFailed, TreadleError, from_wire
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.messages import Abort, ServiceMessage, Submit, Timeline

from .remote import RemoteBackend
from .stream import Stream

_STOP_SECONDS = 15.0
_OWN_START_SECONDS = 15.0


class StartReport(msgspec.Struct, frozen=True):
    """What a server process tells its parent, once, over a pipe. code: "" when it is ready, else the error's."""

    code: str = ""
    message: str = ""


class ServerProcess:
    """A `treadle serve` of our own on a private endpoint; ends with us, whatever happens to us."""

    def __init__(self, model: str, options: Mapping[str, object], start_timeout: float) -> None:
        self._model = model
        self._options = options
        self._start_timeout = start_timeout
        self._runtime: RuntimeDir | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._remote: RemoteBackend | None = None

    async def start(self) -> None:
        self._runtime = RuntimeDir()
        endpoint = self._runtime.endpoint("service.ipc")
        read_end, self._lifeline = os.pipe()
        report_read, report_write = os.pipe()
        command = [sys.executable, "-P", "-m", "treadle", "serve", self._model, "--endpoint", endpoint]
        command += [
            "--parent",
            str(read_end),
            str(report_write),
            "--options",
            msgspec.json.encode(self._options).decode(),
        ]
        try:
            self._process = _spawn(command, [read_end, report_write])
        finally:
            os.close(read_end)
            os.close(report_write)
        seconds = self._start_timeout + _OWN_START_SECONDS  # it has the same limit for its engines, and says more
        try:
            async with asyncio.timeout(seconds):
                await _started(report_read)
        except TimeoutError:
            raise EngineStartFailed(
                f"the server process was not ready within {seconds:g} s; where loading takes longer, give it more with "
                "start_timeout"
            ) from None
        finally:
            os.close(report_read)
        self._remote = RemoteBackend(endpoint, None, connect_timeout=10.0, lost_after=10.0)
        await self._remote.start()

    async def close(self) -> None:
        if self._remote is not None:
            await self._remote.close()
            self._remote = None
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)  # where it was stopped, it hears the first only now
            try:
                await asyncio.to_thread(process.wait, _STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._runtime is not None:
            self._runtime.remove()

    def submit(self, message: Submit, stream: Stream) -> None:
        self._running().submit(message, stream)

    def abort(self, message: Abort) -> None:
        if self._remote is not None:
            self._remote.abort(message)

    async def info(self, kind: str) -> ServiceMessage:
        return await self._running().info(kind)

    async def record(self, seconds: float) -> Timeline:
        return await self._running().record(seconds)

    def _running(self) -> RemoteBackend:
        if self._remote is None:
            raise TreadleError("the server process is not running")
        return self._remote


def _spawn(command: list[str], descriptors: list[int]) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C in the terminal is the parent's to handle."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=descriptors, start_new_session=True
    )


async def _started(descriptor: int) -> None:
    """Waits for the report; raises the error that it names, or EngineStartFailed when the process ended without one."""
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(descriptor, arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(descriptor)
    data = os.read(descriptor, 1 << 16)
    if not data:
        raise EngineStartFailed("the server process ended before it was ready; its standard error says why")
    report = msgspec.json.decode(data, type=StartReport)
    if report.code:
        raise from_wire(report.code, report.message)
