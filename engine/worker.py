"""The loop of a rank: plans in, results out, strictly in order."""

from __future__ import annotations

import ctypes
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import zmq

from treadle.errors import EngineFailed, ProtocolError, TreadleError
from treadle.transport.codec import Codec, Digest, pack
from treadle.transport.messages import (
    Configure,
    Failure,
    Loading,
    Masks,
    Ping,
    PlanMessage,
    Shutdown,
    StepPlan,
    StepResult,
)

from .cuda.runner import PipelinedRunner, Ticket
from .early import Start
from .loading import load
from .profiling import step_profiler
from .runner import StepOutcome, StepRunner, TakeMasks

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
    """A step that was launched. masks: bytes of its message. waits: it is launched up to its logits, and its guided
    rows may not sample yet."""

    plan: StepPlan
    frame: bytes
    ticket: Ticket
    began: float
    waits: bool
    masks: bytes = b""


class _Ended(Exception):
    """Shutdown came where something else was waited for."""


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
        self._plans: deque[tuple[StepPlan, bytes]] = deque()
        self._masks: dict[int, tuple[Masks, bytes]] = {}

    def run(self, runner: StepRunner) -> None:
        """One step after the other."""
        try:
            while True:
                while not self._plans:
                    self._receive()
                plan, frame = self._plans.popleft()
                self._begin(plan)
                take = partial(self._take_masks, plan)
                self._socket.send(self._codec.encode(run_step(runner, plan, frame, self._digest, self._rank, take)))
        except _Ended:
            return

    def _take_masks(self, plan: StepPlan) -> tuple[Masks, bytes]:
        """Waits for the plan's masks; plans that come meanwhile wait in turn."""
        while plan.step not in self._masks:
            self._receive()
        return self._masks.pop(plan.step)

    def run_overlapped(self, runner: PipelinedRunner) -> None:
        """Launches a plan when it comes, whatever is running, and answers when its step is done.

        While a step runs, the next plan and the end of the step may come in either order, and ZeroMQ knows nothing of
        the device: so the loop looks at both, and sleeps in between. With nothing on its way it sleeps in the socket.
        A step with guided rows is launched up to its logits; it samples, and the next is launched, when its masks come.
        """
        _sleep_precisely()
        steps: deque[_Open] = deque()
        try:
            while True:
                if steps and not self._wait(runner, steps[0]):
                    self._answer(runner, steps.popleft())
                    continue
                self._receive()
                while self._launch(runner, steps):
                    pass
        except _Ended:
            return

    def _launch(self, runner: PipelinedRunner, steps: deque[_Open]) -> bool:
        """Launches what can be launched next: the samples of the newest step, or a plan. False when nothing can."""
        if steps and steps[-1].waits:
            step = steps[-1]
            if step.plan.step not in self._masks:
                return False
            masks, step.masks = self._masks.pop(step.plan.step)
            runner.sample(step.ticket, masks)
            step.waits = False
            return True
        if not self._plans:
            return False
        plan, frame = self._plans.popleft()
        self._begin(plan)
        began = time.perf_counter()
        steps.append(_Open(plan, frame, runner.submit(plan), began, bool(plan.guided)))
        return True

    def _wait(self, runner: PipelinedRunner, oldest: _Open) -> bool:
        """Whether a message is there; False once the oldest step is done. A plan goes first: the device may be idle."""
        if oldest.waits:
            return True  # nothing but a message can help it
        began = time.perf_counter()
        while not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            if runner.done(oldest.ticket):
                return False
            time.sleep(_NAP if time.perf_counter() - began < _LONG_AFTER else _LONG_NAP)
        return True

    def _answer(self, runner: PipelinedRunner, step: _Open) -> None:
        outcome = runner.collect(step.ticket)
        self._digest.add(step.frame)
        self._digest.add(step.masks)
        now = time.perf_counter()
        result = _result(step.plan, outcome, self._digest, self._rank, max(step.began, self._ended), now)
        self._ended = now
        self._socket.send(self._codec.encode(result))

    def _receive(self) -> None:
        """Takes in one message. Raises _Ended at the end."""
        frame = self._socket.recv()
        message = self._codec.decode(frame)
        if isinstance(message, Shutdown):
            raise _Ended
        if isinstance(message, Ping):
            return  # it asks for nothing
        if isinstance(message, StepPlan):
            self._plans.append((message, frame))
        elif isinstance(message, Masks):
            self._masks[message.step] = message, frame
        else:
            raise ProtocolError(f"{type(message).__name__} where a plan was expected")

    def _begin(self, plan: StepPlan) -> None:
        self.step = plan.step
        if self._profiler is not None:
            self._profiler.before(plan)


def run_step(
    runner: StepRunner,
    plan: StepPlan,
    frame: bytes,
    digest: Digest,
    rank: int,
    take: Callable[[], tuple[Masks, bytes]] | None = None,
) -> StepResult:
    """Executes `plan`, whose encoded bytes are `frame`, and answers for it. Advances `digest`.

    take: brings the plan's masks with their bytes; called once, after the forward pass, if it has guided rows.
    """
    began = time.perf_counter()
    digest.add(frame)
    outcome = runner.step(plan, _digested(take, digest) if take is not None else None)
    return _result(plan, outcome, digest, rank, began, time.perf_counter())


def _digested(take: Callable[[], tuple[Masks, bytes]], digest: Digest) -> TakeMasks:
    def taken() -> Masks:
        masks, frame = take()
        digest.add(frame)
        return masks

    return taken


def _result(plan: StepPlan, outcome: StepOutcome, digest: Digest, rank: int, began: float, ended: float) -> StepResult:
    """Advances `digest`, which has the plan, over the tokens. began, ended: by `time.perf_counter`."""
    tokens = pack(outcome.tokens)
    elapsed_us, sample_us = round((ended - began) * 1e6), round(outcome.sample_seconds * 1e6)
    return StepResult(
        step=plan.step,
        rank=rank,
        digest=digest.add(tokens),
        tokens=tokens if rank == 0 else b"",
        elapsed_us=elapsed_us,
        logprobs=outcome.logprobs if rank == 0 else [],
        faults=outcome.faults if rank == 0 else [],
        began_us=round(began * 1e6),
        forward_us=elapsed_us - sample_us,
        sample_us=sample_us,
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
