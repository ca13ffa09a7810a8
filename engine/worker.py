"""The loop of a rank: plans in, results out, strictly in order."""

from __future__ import annotations

import time
import traceback

import torch
import zmq

from treadle.errors import EngineFailed, ProtocolError, TreadleError
from treadle.transport.codec import Codec, Digest, pack
from treadle.transport.messages import Configure, Failure, PlanMessage, Shutdown, StepPlan, StepResult

from .loading import load
from .runner import Runner

_LAST_WORDS_MS = 2_000


def serve(socket: zmq.Socket[bytes], codec: Codec[PlanMessage], rank: int) -> int:
    """Configures itself from the first message, then steps until `Shutdown`. Returns the exit code."""
    step = -1
    try:
        configure = codec.decode(socket.recv())
        if not isinstance(configure, Configure):
            raise ProtocolError(f"the first message must be Configure, not {type(configure).__name__}")
        loaded = load(configure, rank)
        socket.send(codec.encode(loaded.ready))
        digest = Digest()
        while True:
            frame = socket.recv()
            message = codec.decode(frame)
            if isinstance(message, Shutdown):
                return 0
            if not isinstance(message, StepPlan):
                raise ProtocolError(f"{type(message).__name__} where a plan was expected")
            step = message.step
            socket.send(codec.encode(run_step(loaded.runner, message, frame, digest, rank)))
    except Exception as error:  # the last resort of a process: say what happened to whoever restarts it
        failure = Failure(rank, step, _code(error), f"{type(error).__name__}: {error}", traceback.format_exc())
        socket.send(codec.encode(failure))
        socket.close(_LAST_WORDS_MS)
        return 1


def run_step(runner: Runner, plan: StepPlan, frame: bytes, digest: Digest, rank: int) -> StepResult:
    """Executes `plan`, whose encoded bytes are `frame`, and answers for it. Advances `digest`."""
    began = time.perf_counter()
    digest.add(frame)
    outcome = runner.step(plan)
    tokens = pack(outcome.tokens)
    return StepResult(
        step=plan.step,
        rank=rank,
        digest=digest.add(tokens),
        tokens=tokens if rank == 0 else b"",
        elapsed_us=round((time.perf_counter() - began) * 1e6),
        logprobs=outcome.logprobs if rank == 0 else [],
        faults=outcome.faults if rank == 0 else [],
    )


def _code(error: Exception) -> str:
    if isinstance(error, TreadleError):
        return error.code
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "does_not_fit"
    return EngineFailed.code
