"""One incarnation of the engine ranks: start them, talk to them, notice when one dies, leave none behind.

A group is disposable (D7). It never restarts anything: it reports one death, and its owner makes another group.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from treadle.errors import EngineStartFailed, ProtocolError, TreadleError, from_wire
from treadle.transport.channel import Channel
from treadle.transport.codec import engine_codec
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.messages import (
    PROTOCOL_VERSION,
    Configure,
    Failure,
    Hello,
    Loading,
    Ready,
    Shutdown,
    StepResult,
)
from treadle.transport.sockets import group_socket

from .loading_progress import LOGGER, LoadingProgress, phases_line

logger = logging.getLogger(LOGGER)
_LOG_TAIL = 2_000


@dataclass(slots=True)
class Death:
    """Why a group ended: which rank, doing which step (-1: none yet), and what it said or how it exited."""

    rank: int
    step: int
    error: TreadleError


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen[bytes]
    pidfd: int
    exited: asyncio.Event = field(default_factory=asyncio.Event)


class EngineGroup:
    """Ranks 0..world_size-1 behind one ROUTER socket. All methods run on the loop's thread.

    on_result: every StepResult, in order per rank. on_death: once, at the first sign that the group is lost.
    """

    def __init__(
        self,
        number: int,
        configure: Configure,
        runtime: RuntimeDir,
        leftovers: Sequence[Path],
        on_result: Callable[[StepResult], None],
        on_death: Callable[[Death], None],
    ) -> None:
        self._configure = configure
        self._runtime = runtime
        self._leftovers = [runtime.path, *leftovers]
        self._on_result = on_result
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._codec = engine_codec()
        self._token = secrets.token_hex(16)
        self._endpoint = runtime.endpoint(f"engine-{number}.ipc")
        self._number = number
        self._processes: list[_Process] = []
        self._ready: dict[int, Ready] = {}
        self._progress = LoadingProgress(configure.world_size)
        self._all_ready: asyncio.Future[None] = self._loop.create_future()
        self.death: Death | None = None
        self._known: set[int] = set()
        self._stopping = False
        self._lifeline: tuple[int, ...] = ()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket = group_socket(self._context)
            socket.bind(self._endpoint)
            self._lifeline = os.pipe()
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._channel = Channel(socket, self._receive)

    @property
    def pids(self) -> list[int]:
        return [process.popen.pid for process in self._processes]

    async def start(self, timeout: float) -> list[Ready]:
        """Starts all ranks and waits until each is ready. Raises the rank's own error, or EngineStartFailed."""
        for rank in range(self._configure.world_size):
            self._spawn(rank)
        try:
            await asyncio.wait_for(asyncio.shield(self._all_ready), timeout)
        except TimeoutError:
            missing = sorted(set(range(self._configure.world_size)) - set(self._ready))
            raise EngineStartFailed(
                f"engine ranks {missing} were not ready within {timeout:g} s; where loading takes longer, give them "
                "more with start_timeout (--start-timeout)"
            ) from None
        ready = [self._ready[rank] for rank in range(self._configure.world_size)]
        if len({(r.fingerprint, r.num_blocks) for r in ready}) != 1:
            raise EngineStartFailed(f"the ranks hold different models or cache sizes: {ready}")
        return ready

    def broadcast(self, frame: bytes) -> None:
        """Sends the same bytes to every rank; a rank that cannot take them counts as dead."""
        for rank in range(self._configure.world_size):
            try:
                sent = self._channel.send([b"rank-%d" % rank, frame])
            except zmq.ZMQError as error:
                self._die(rank, -1, EngineStartFailed(f"rank {rank} cannot be reached: {error}"))
                return
            if not sent:
                self._die(rank, -1, EngineStartFailed(f"rank {rank} does not read its plans"))
                return

    async def stop(self, timeout: float) -> None:
        """Asks the ranks to finish, waits at most `timeout` seconds, then kills; returns when none is left."""
        self._stopping = True
        if self.death is None:
            shutdown = self._codec.encode(Shutdown())
            for rank in self._ready:
                try:
                    self._channel.send([b"rank-%d" % rank, shutdown])
                except zmq.ZMQError:
                    continue  # it is gone already, which is what we want
            await self._wait(timeout if self._ready else 0)
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL for whoever is left (a stopped process does not hear SIGTERM), and waits until they are gone."""
        self._stopping = True
        for process in self._processes:
            if not process.exited.is_set():
                process.popen.send_signal(signal.SIGKILL)
        await self._wait(None)
        self._channel.close()
        self._context.term()
        lifeline, self._lifeline = (
            self._lifeline,
            (),
        )  # two may close at once, and a number closed twice is a stranger's
        for descriptor in lifeline:
            os.close(descriptor)
        if not self._all_ready.done():
            self._all_ready.cancel()

    async def _wait(self, timeout: float | None) -> None:
        exits = [asyncio.ensure_future(process.exited.wait()) for process in self._processes]
        if exits:
            _, pending = await asyncio.wait(exits, timeout=timeout)
            for waiter in pending:
                waiter.cancel()

    def _spawn(self, rank: int) -> None:
        command = [sys.executable, "-m", "treadle.engine", "--endpoint", self._endpoint, "--rank", str(rank)]
        command += ["--lifeline", str(self._lifeline[0])]
        if not self._configure.native:
            command.append("--no-native")
        for path in self._leftovers:
            command += ["--leftover", str(path)]
        with self._log(rank).open("wb") as log:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lifeline[0]],
                env=_environment(self._configure.threads, self._token),
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
        process = _Process(popen, os.pidfd_open(popen.pid))
        self._processes.append(process)
        self._loop.add_reader(process.pidfd, self._exited, rank, process)

    def _exited(self, rank: int, process: _Process) -> None:
        self._loop.remove_reader(process.pidfd)
        os.close(process.pidfd)
        code = process.popen.wait()
        process.exited.set()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # A rank's own last words may still be in the socket: they say more than its exit code.
        self._loop.call_later(0.05, self._report_exit, rank, how)

    def _report_exit(self, rank: int, how: str) -> None:
        if not self._stopping:
            tail = self._log(rank).read_bytes()[-_LOG_TAIL:].decode(errors="replace") if self.death is None else ""
            self._die(rank, -1, EngineStartFailed(f"engine rank {rank} ended with {how}\n{tail}".rstrip()))

    def _receive(self, frames: list[bytes]) -> None:
        try:
            identity, frame = frames
            message = self._codec.decode(frame)
            rank = int(identity.removeprefix(b"rank-"))
        except (ProtocolError, ValueError) as error:
            self._die(-1, -1, ProtocolError(f"a malformed message from an engine rank: {error}"))
            return
        if isinstance(message, Hello):
            self._welcome(identity, rank, message)
        elif rank not in self._known:
            return  # it never showed the group's token: no answer, no harm
        elif isinstance(message, StepResult):
            if message.rank != rank:
                self._die(rank, message.step, ProtocolError(f"rank {rank} answered as rank {message.rank}"))
            else:
                self._on_result(message)
        elif isinstance(message, Loading):
            self._progress.update(message, self._loop.time())
        elif isinstance(message, Ready):
            self._ready[rank] = message
            logger.info("engine rank %d is ready after %s", rank, phases_line(message.phases))
            if len(self._ready) == self._configure.world_size and not self._all_ready.done():
                self._all_ready.set_result(None)
        else:
            self._failed(rank, message)

    def _welcome(self, identity: bytes, rank: int, hello: Hello) -> None:
        if not secrets.compare_digest(hello.token, self._token):
            return
        if hello.version != PROTOCOL_VERSION or hello.rank != rank:
            text = f"rank {rank} speaks protocol {hello.version}, this scheduler {PROTOCOL_VERSION}"
            self._die(rank, -1, ProtocolError(text))
            return
        self._known.add(rank)
        try:
            self._channel.send([identity, self._codec.encode(self._configure)])
        except zmq.ZMQError as error:
            self._die(rank, -1, EngineStartFailed(f"rank {rank} cannot be reached: {error}"))

    def _failed(self, rank: int, failure: Failure) -> None:
        kind = type(from_wire(failure.code, "")).__name__  # the rank's text begins with it, and so will ours
        said = failure.message.removeprefix(f"{kind}: ")
        error = from_wire(failure.code, f"engine rank {rank}: {said}")
        if said == failure.message:  # nobody foresaw it: where it happened is all there is to go by
            error.add_note(failure.details)
        self._die(rank, failure.step, error)

    def _die(self, rank: int, step: int, error: TreadleError) -> None:
        if self.death is not None or self._stopping:
            return
        self.death = Death(rank, step, error)
        if not self._all_ready.done():
            self._all_ready.set_exception(error)
            self._all_ready.exception()  # marks it as seen: start() may have been cancelled
        else:
            self._on_death(self.death)

    def _log(self, rank: int) -> Path:
        return self._runtime.path / f"engine-{self._number}-rank-{rank}.log"


def _environment(threads: int, token: str) -> dict[str, str]:
    """The child's environment. OpenMP threads that spin beside the scheduler cost more than they bring."""
    return {
        **os.environ,
        "TREADLE_GROUP_TOKEN": token,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "PYTHONUNBUFFERED": "1",
    }
