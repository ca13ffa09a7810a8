"""The loop of a rank: plans in, results out, strictly in order."""

from __future__ import annotations

import ctypes
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass

import torch
import zmq

from treadle.errors import EngineFailed, ProtocolError, TreadleError
from treadle.transport.codec import Codec, Digest, pack
from treadle.transport.messages import Configure, Failure, Loading, PlanMessage, Shutdown, StepPlan, StepResult

from .cuda.runner import PipelinedRunner, Ticket
from .early import Start
from .loading import load
from .profiling import step_profiler
from .runner import StepOutcome, StepRunner

_LAST_WORDS_MS = 2_000
# Between two looks at the device and the socket while a step runs: as long as nobody notices, then longer. Seconds.
_NAP, _LONG_NAP, _LONG_AFTER = 10e-6, 100e-6, 20e-3
_PR_SET_TIMERSLACK = 29
_SLACK_NS = 1_000


def serve(socket: zmq.Socket[bytes], codec: Codec[PlanMessage], rank: int, first: bytes, start: Start) -> int:
    """Configures itself from the first message, then steps until `Shutdown`. Returns the exit code."""
    loop: _Loop | None = None
    try:
        configure = codec.decode(first)
        if not isinstance(configure, Configure):
            raise ProtocolError(f"the first message must be Configure, not {type(configure).__name__}")
        start.report = lambda done, total: socket.send(codec.encode(Loading(rank, done, total)))
        loaded = load(configure, rank, start=start)
        socket.send(codec.encode(loaded.ready))
        loop = _Loop(socket, codec, rank)
        if configure.overlap and isinstance(loaded.runner, PipelinedRunner):
            loop.run_overlapped(loaded.runner)
        else:
            loop.run(loaded.runner)
        return 0
    except Exception as error:  # the last resort of a process: say what happened to whoever restarts it
        step = loop.step if loop is not None else -1
        failure = Failure(rank, step, _code(error), f"{type(error).__name__}: {error}", traceback.format_exc())
        socket.send(codec.encode(failure))
        socket.close(_LAST_WORDS_MS)
        return 1


@dataclass(slots=True)
class _Open:
    """A step that was launched."""

    plan: StepPlan
    frame: bytes
    ticket: Ticket
    began: float


class _Loop:
    """step: the last that was begun, -1 before the first."""

    def __init__(self, socket: zmq.Socket[bytes], codec: Codec[PlanMessage], rank: int) -> None:
        self.step = -1
        self._socket = socket
        self._codec = codec
        self._rank = rank
        self._digest = Digest()
        self._ended = 0.0
        self._profiler = step_profiler(rank)

    def run(self, runner: StepRunner) -> None:
        """One step after the other."""
        while (received := self._receive()) is not None:
            plan, frame = received
            self._socket.send(self._codec.encode(run_step(runner, plan, frame, self._digest, self._rank)))

    def run_overlapped(self, runner: PipelinedRunner) -> None:
        """Launches a plan when it comes, whatever is running, and answers when its step is done.

        While a step runs, the next plan and the end of the step may come in either order, and ZeroMQ knows nothing of
        the device: so the loop looks at both, and sleeps in between. With nothing on its way it sleeps in the socket.
        """
        _sleep_precisely()
        steps: deque[_Open] = deque()
        while True:
            if steps and not self._wait(runner, steps[0]):
                self._answer(runner, steps.popleft())
                continue
            received = self._receive()
            if received is None:
                return
            plan, frame = received
            began = time.perf_counter()
            steps.append(_Open(plan, frame, runner.submit(plan), began))

    def _wait(self, runner: PipelinedRunner, oldest: _Open) -> bool:
        """Whether a message is there; False once the oldest step is done. A plan goes first: the device may be idle."""
        began = time.perf_counter()
        while not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            if runner.done(oldest.ticket):
                return False
            time.sleep(_NAP if time.perf_counter() - began < _LONG_AFTER else _LONG_NAP)
        return True

    def _answer(self, runner: PipelinedRunner, step: _Open) -> None:
        outcome = runner.collect(step.ticket)
        self._digest.add(step.frame)
        now = time.perf_counter()
        result = _result(step.plan, outcome, self._digest, self._rank, now - max(step.began, self._ended))
        self._ended = now
        self._socket.send(self._codec.encode(result))

    def _receive(self) -> tuple[StepPlan, bytes] | None:
        """The next plan with its bytes, None at the end."""
        frame = self._socket.recv()
        message = self._codec.decode(frame)
        if isinstance(message, Shutdown):
            return None
        if not isinstance(message, StepPlan):
            raise ProtocolError(f"{type(message).__name__} where a plan was expected")
        self.step = message.step
        if self._profiler is not None:
            self._profiler.before(message)
        return message, frame


def run_step(runner: StepRunner, plan: StepPlan, frame: bytes, digest: Digest, rank: int) -> StepResult:
    """Executes `plan`, whose encoded bytes are `frame`, and answers for it. Advances `digest`."""
    began = time.perf_counter()
    digest.add(frame)
    outcome = runner.step(plan)
    return _result(plan, outcome, digest, rank, time.perf_counter() - began)


def _result(plan: StepPlan, outcome: StepOutcome, digest: Digest, rank: int, elapsed: float) -> StepResult:
    """Advances `digest`, which has the plan, over the tokens."""
    tokens = pack(outcome.tokens)
    return StepResult(
        step=plan.step,
        rank=rank,
        digest=digest.add(tokens),
        tokens=tokens if rank == 0 else b"",
        elapsed_us=round(elapsed * 1e6),
        logprobs=outcome.logprobs if rank == 0 else [],
        faults=outcome.faults if rank == 0 else [],
    )


def _sleep_precisely() -> None:
    """Linux adds 50 microseconds to every sleep unless the thread asks for less (prctl(2), PR_SET_TIMERSLACK)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _SLACK_NS, 0, 0, 0)


def _code(error: Exception) -> str:
    if isinstance(error, TreadleError):
        return error.code
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "does_not_fit"
    return EngineFailed.code
