"""One incarnation of the engine ranks: start them, talk to them, notice when one dies, leave none behind.

A group is disposable (D7). It never restarts anything: it reports one death, and its owner makes another group.

A process that ends is seen by its pidfd, a lost socket by ZeroMQ's monitor, both as they happen. When a pidfd says that
a process has ended, the kernel has closed all its files, so what it held of a GPU is free too.
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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from treadle.errors import EngineFailed, EngineStartFailed, ProtocolError, TreadleError, from_wire
from treadle.transport.channel import Channel
from treadle.transport.codec import engine_codec
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.mask_pages import MaskPages, make_pages
from treadle.transport.messages import (
    PROTOCOL_VERSION,
    Configure,
    Failure,
    Hello,
    Loading,
    Ping,
    Ready,
    Shutdown,
    StepResult,
)
from treadle.transport.sockets import group_socket

from .lifecycle import Cause
from .loading_progress import LOGGER, LoadingProgress, phases_line
from .setup import Held, held
from .watchdog import process_state

logger = logging.getLogger("treadle")
loading = logging.getLogger(LOGGER)
ENGINE_COMMAND = (sys.executable, "-P", "-m", "treadle.engine")
_LOG_TAIL = 2_000
_LAST_WORDS_SECONDS = 0.05
_TERM_SECONDS = 0.2
_KILL_SECONDS = 30.0
_STACKS_SECONDS = 0.3


@dataclass(slots=True)
class Death:
    """Why a group ended: which rank, doing which step (-1: none yet), how it showed, and what it said."""

    rank: int
    step: int
    cause: Cause
    error: TreadleError


@dataclass(slots=True)
class _Process:
    popen: subprocess.Popen[bytes]
    pidfd: int
    exited: asyncio.Event = field(default_factory=asyncio.Event)


class EngineGroup:
    """Ranks 0..world_size-1 behind one ROUTER socket. All methods run on the loop's thread.

    on_result: every StepResult, in order per rank. on_death: once, at the first sign that the group is lost, unless
    that is while it starts: then `start` raises. command: starts a rank; another program than `treadle.engine` must
    take the same arguments and speak the same protocol.
    """

    def __init__(
        self,
        number: int,
        configure: Configure,
        runtime: RuntimeDir,
        leftovers: Sequence[Path],
        on_result: Callable[[StepResult], None],
        on_death: Callable[[Death], None],
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._command = command
        self._configure = configure
        self._runtime = runtime
        self._leftovers = [runtime.path, *leftovers]
        self._on_result = on_result
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._codec = engine_codec()
        self._token = secrets.token_hex(16)
        self._endpoint = runtime.endpoint(f"engine-{number}.ipc")
        self.number = number
        self._processes: list[_Process] = []
        self._ready: dict[int, Ready] = {}
        self._progress = LoadingProgress(configure.world_size)
        self._all_ready: asyncio.Future[None] = self._loop.create_future()
        self.death: Death | None = None
        self._known: set[int] = set()
        self._stopping = False
        self._closed = False
        self._lifeline: tuple[int, ...] = ()
        self._masks = -1
        self.mask_pages: MaskPages | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            socket = group_socket(self._context)
            socket.bind(self._endpoint)
            self._lifeline = os.pipe()
            if configure.mask_slots:
                self._masks, self.mask_pages = make_pages(
                    configure.mask_slots, configure.max_num_seqs, configure.mask_words
                )
        except BaseException:
            self._context.destroy(linger=0)
            for descriptor in self._lifeline:
                os.close(descriptor)
            raise
        self._channel = Channel(socket, self._receive)
        self._socket = socket
        self._monitor = Channel(socket.get_monitor_socket(zmq.EVENT_DISCONNECTED), self._disconnected)

    @property
    def pids(self) -> list[int]:
        return [process.popen.pid for process in self._processes]

    @property
    def held(self) -> Held:
        """What each rank holds, once the group is ready."""
        return held(self._ready.values())

    @property
    def stages(self) -> str:
        """What each rank is at that is not ready."""
        missing = [rank for rank in range(self._configure.world_size) if rank not in self._ready]
        return ", ".join(f"rank {rank}: {self._stage(rank)}" for rank in missing)

    @property
    def heard(self) -> bool:
        """Some rank has said hello."""
        return bool(self._known)

    def _stage(self, rank: int) -> str:
        if rank in self._ready:
            return "waiting for the others"
        return self._progress.stage(rank) if rank in self._known else "starting its program"

    async def start(self, timeout: float) -> list[Ready]:
        """Starts all ranks and waits until each is ready. Raises the rank's own error, or EngineStartFailed."""
        for rank in range(self._configure.world_size):
            self._spawn(rank)
        try:
            await asyncio.wait_for(asyncio.shield(self._all_ready), timeout)
        except TimeoutError:
            missing = sorted(set(range(self._configure.world_size)) - set(self._ready))
            raise EngineStartFailed(
                f"engine ranks {missing} were not ready within {timeout:g} s ({self.stages}); where loading takes "
                "longer, give them more with start_timeout (--start-timeout)"
            ) from None
        ready = [self._ready[rank] for rank in range(self._configure.world_size)]
        if len({(r.fingerprint, r.num_blocks, r.swap_blocks) for r in ready}) != 1:
            raise EngineStartFailed(f"the ranks hold different models or cache sizes: {ready}")
        return ready

    def broadcast(self, frame: bytes) -> None:
        """Sends the same bytes to every rank; a rank that cannot take them counts as dead."""
        for rank in range(self._configure.world_size):
            if not self._send(rank, frame):
                return

    def _send(self, rank: int, frame: bytes) -> bool:
        try:
            sent = self._channel.send([b"rank-%d" % rank, frame])
        except zmq.ZMQError as error:
            self._report_unreachable(rank, f"rank {rank} cannot be reached: {error}")
            return False
        if not sent:
            self._die(rank, -1, "unreachable", EngineFailed(f"rank {rank} does not read its plans"))
        return sent

    async def describe(self) -> list[str]:
        """What each rank is doing: what the kernel says of it, and the stacks of its threads, if it can show them."""
        asked = [rank for rank in self._known if not self._processes[rank].exited.is_set()]
        before = {rank: _size(self._stacks(rank)) for rank in asked}
        for rank in asked:
            self._processes[rank].popen.send_signal(signal.SIGUSR1)
        await asyncio.sleep(_STACKS_SECONDS)
        lines: list[str] = []
        for rank, process in enumerate(self._processes):
            lines.append(f"rank {rank}, process {process.popen.pid}: {process_state(process.popen.pid)}")
            if rank in before:
                lines += _from(self._stacks(rank), before[rank]) or ["  it shows no stacks: stopped, or gone"]
        return lines

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
        """Ends whoever is left and waits until they are gone. Safe to call twice.

        SIGTERM lets a rank that still runs go by itself; a stopped one needs SIGCONT to hear it. SIGKILL follows.
        """
        self._stopping = True
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._signal(number)
        await self._wait(_TERM_SECONDS)
        self._signal(signal.SIGKILL)
        await self._wait(_KILL_SECONDS)
        left = [process.popen.pid for process in self._processes if not process.exited.is_set()]
        if left:  # in the kernel, in a driver most likely: nobody can do more, and it is no reason to wait for ever
            logger.error("engine processes %s do not end, SIGKILL notwithstanding; they may hold memory", left)
        if not self._closed:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self.mask_pages = None  # masks that are being made have a hold of their own
        self._socket.disable_monitor()
        self._monitor.close()
        self._channel.close()
        self._context.term()
        for descriptor in (*self._lifeline, *self._shared()):
            os.close(descriptor)
        if not self._all_ready.done():
            self._all_ready.cancel()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if not process.exited.is_set():
                process.popen.send_signal(number)

    async def _wait(self, timeout: float | None) -> None:
        exits = [asyncio.ensure_future(process.exited.wait()) for process in self._processes]
        if exits:
            _, pending = await asyncio.wait(exits, timeout=timeout)
            for waiter in pending:
                waiter.cancel()

    def _spawn(self, rank: int) -> None:
        command = [*self._command, "--endpoint", self._endpoint, "--rank", str(rank)]
        command += ["--lifeline", str(self._lifeline[0]), "--stacks", str(self._stacks(rank))]
        if not self._configure.native:
            command.append("--no-native")
        for path in self._leftovers:
            command += ["--leftover", str(path)]
        for descriptor in self._shared():
            command += ["--masks", str(descriptor)]
        with self._log(rank).open("wb") as log:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._lifeline[0], *self._shared()],
                env=_environment(self._configure.threads, self._token),
                start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
            )
        try:
            process = _Process(popen, os.pidfd_open(popen.pid))
        except OSError:  # no descriptor left: nobody would see it end
            popen.kill()
            popen.wait()
            raise
        self._processes.append(process)
        self._loop.add_reader(process.pidfd, self._exited, rank, process)

    def _shared(self) -> list[int]:
        """Descriptors of memory that the ranks have, too."""
        return [] if self._masks < 0 else [self._masks]

    def _exited(self, rank: int, process: _Process) -> None:
        self._loop.remove_reader(process.pidfd)
        os.close(process.pidfd)
        with suppress(ProcessLookupError, PermissionError):  # what it started ends with it; its number is not free yet
            os.killpg(process.popen.pid, signal.SIGKILL)
        code = process.popen.wait()
        process.exited.set()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # A rank's own last words may still be in the socket: they say more than its exit code.
        self._loop.call_later(_LAST_WORDS_SECONDS, self._report_exit, rank, how)

    def _report_exit(self, rank: int, how: str) -> None:
        if not self._stopping:
            tail = self._log(rank).read_bytes()[-_LOG_TAIL:].decode(errors="replace") if self.death is None else ""
            text = f"engine rank {rank} ended with {how}{self._was_at(rank)}\n{tail}"
            self._die(rank, -1, "exit", EngineStartFailed(text.rstrip()))

    def _disconnected(self, _: list[bytes]) -> None:
        """Some peer's connection is gone; a rank does not connect again. If it was a process that ended, that is
        reported first."""
        self._loop.call_later(2 * _LAST_WORDS_SECONDS, self._look_round)

    def _look_round(self) -> None:
        """A message that says nothing finds out which rank does not hear any more; it may also have been a stranger."""
        ping = self._codec.encode(Ping(0))
        for rank in sorted(self._known):
            if self._stopping or not self._send(rank, ping):
                return

    def _report_unreachable(self, rank: int, text: str) -> None:
        """A process that is ending cannot be reached either; how it ended says more, and is known in a moment."""

        def report() -> None:
            self._die(rank, -1, "unreachable", EngineFailed(text + self._was_at(rank)))

        self._loop.call_later(2 * _LAST_WORDS_SECONDS, report)

    def _receive(self, frames: list[bytes]) -> None:
        try:
            identity, frame = frames
            message = self._codec.decode(frame)
            rank = int(identity.removeprefix(b"rank-"))
        except (ProtocolError, ValueError) as error:
            self._die(-1, -1, "malformed", ProtocolError(f"a malformed message from an engine rank: {error}"))
            return
        if isinstance(message, Hello):
            self._welcome(identity, rank, message)
        elif rank not in self._known:
            return  # it never showed the group's token: no answer, no harm
        elif isinstance(message, StepResult):
            if message.rank != rank:
                text = f"rank {rank} answered as rank {message.rank}"
                self._die(rank, message.step, "malformed", ProtocolError(text))
            else:
                self._on_result(message)
        elif isinstance(message, Loading):
            self._progress.update(message, self._loop.time())
        elif isinstance(message, Ready):
            self._ready[rank] = message
            loading.info("engine rank %d is ready after %s", rank, phases_line(message.phases))
            if message.slow:
                logger.warning("engine rank %d: %s; why is in %s", rank, message.slow, self._log(rank))
            if len(self._ready) == self._configure.world_size and not self._all_ready.done():
                self._all_ready.set_result(None)
        else:
            self._failed(rank, message)

    def _welcome(self, identity: bytes, rank: int, hello: Hello) -> None:
        if not secrets.compare_digest(hello.token, self._token):
            return
        if hello.version != PROTOCOL_VERSION or hello.rank != rank:
            text = f"rank {rank} speaks protocol {hello.version}, this scheduler {PROTOCOL_VERSION}"
            self._die(rank, -1, "malformed", ProtocolError(text))
            return
        self._known.add(rank)
        self._send(rank, self._codec.encode(self._configure))

    def _failed(self, rank: int, failure: Failure) -> None:
        kind = type(from_wire(failure.code, "")).__name__  # the rank's text begins with it, and so will ours
        said = failure.message.removeprefix(f"{kind}: ")
        error = from_wire(failure.code, f"engine rank {rank}: {said}")
        if said == failure.message:  # nobody foresaw it: where it happened is all there is to go by
            error.add_note(failure.details)
        self._die(rank, failure.step, "raised", error)

    def _die(self, rank: int, step: int, cause: Cause, error: TreadleError) -> None:
        if self.death is not None or self._stopping:
            return
        self.death = Death(rank, step, cause, error)
        if not self._all_ready.done():
            self._all_ready.set_exception(error)
            self._all_ready.exception()  # marks it as seen: start() may have been cancelled
        else:
            self._on_death(self.death)

    def _was_at(self, rank: int) -> str:
        """For the end of a sentence that says what happened to a rank: where, if that was before all were ready."""
        return "" if self._all_ready.done() else f"; it was {self._stage(rank)}"

    def _stacks(self, rank: int) -> Path:
        return self._runtime.path / f"engine-{self.number}-rank-{rank}.stacks"

    def _log(self, rank: int) -> Path:
        return self._runtime.path / f"engine-{self.number}-rank-{rank}.log"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _from(path: Path, offset: int) -> list[str]:
    """The lines that were added to a file since it had `offset` bytes."""
    try:
        return path.read_bytes()[offset:].decode(errors="replace").splitlines()
    except OSError:
        return []


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
