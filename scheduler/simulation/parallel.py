"""Replicas in parallel processes: `python -m treadle.scheduler.simulation`, fed and read through its pipes.

No fork, and no `__main__` imported again: it works in a notebook and leaves nothing behind. Each process takes one
replica after the other. Frames are a length (uint32, little-endian) and a msgpack message.
"""

from __future__ import annotations

import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.errors import ServiceError, TreadleError, from_wire
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.recording import config_from_log, config_to_log

from .replica import Replica
from .result import ReplicaResult
from .sizes import TOO_LARGE, too_large
from .workload import Workload

_LENGTH = struct.Struct("<I")
Indices = npt.NDArray[np.intp]


class Task(msgspec.Struct, array_like=True):
    """A replica to simulate. columns: of its workload, as bytes with their dtype."""

    config: dict[str, Any]
    costs: StepCosts
    overhead: float
    columns: dict[str, tuple[str, bytes]]
    tenants: tuple[str, ...]
    prompts: tuple[bytes, ...] | None


class Came(msgspec.Struct, array_like=True, tag=True):
    """How far it is."""

    seconds: float
    requests: int


class Done(msgspec.Struct, array_like=True, tag=True):
    result: ReplicaResult


class Refusal(msgspec.Struct, array_like=True, tag=True):
    code: str
    message: str


def run_parallel(
    config: CoreConfig,
    costs: StepCosts,
    overhead: float,
    workload: Workload,
    parts: Sequence[Indices],
    jobs: int,
    progress: Callable[[int, float, int], None] | None,
) -> list[ReplicaResult]:
    """The results of all parts, in their order. progress is called from several threads, one at a time."""
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(parts)):
        pending.put(number)
    results: dict[int, ReplicaResult] = {}
    lock = threading.Lock()
    workers: list[_Worker] = []

    def told(number: int, came: Came) -> None:
        if progress is not None:
            with lock:
                progress(number, came.seconds, came.requests)

    def work(worker: _Worker) -> None:
        while True:
            try:
                number = pending.get_nowait()
            except queue.Empty:
                return
            task = _task(config, costs, overhead, workload.take(parts[number]))
            results[number] = worker.run(task, partial(told, number))

    try:
        workers += [_Worker() for _ in range(min(jobs, len(parts)))]
        with ThreadPoolExecutor(len(workers)) as threads:
            running = [threads.submit(work, worker) for worker in workers]
            try:
                for done in running:
                    done.result()
            finally:
                for worker in workers:
                    worker.end()  # also what the other threads wait for, if one of them failed
    finally:
        for worker in workers:
            worker.end()
    return [results[number] for number in range(len(parts))]


class _Worker:
    """A process that simulates. It ends when its standard input does, so it cannot outlive us."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-m", "treadle.scheduler.simulation"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._decoder = msgspec.msgpack.Decoder(Came | Done | Refusal)

    def run(self, task: Task, told: Callable[[Came], None]) -> ReplicaResult:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None  # they are pipes
        try:
            send(stdin, task)
            while (frame := receive(stdout)) is not None:
                message: Came | Done | Refusal = self._decoder.decode(frame)
                if isinstance(message, Done):
                    return message.result
                if isinstance(message, Refusal):
                    raise from_wire(message.code, message.message)
                told(message)
        except BrokenPipeError:
            pass
        raise ServiceError(f"a simulating process ended with code {self._process.wait()}")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def _task(config: CoreConfig, costs: StepCosts, overhead: float, workload: Workload) -> Task:
    columns = {name: (column.dtype.str, column.tobytes()) for name, column in workload.columns().items()}
    return Task(config_to_log(config), costs, overhead, columns, workload.tenants, workload.prompts)


def serve(stdin: IO[bytes], stdout: IO[bytes]) -> None:
    """What the process does: tasks in, results out, until there are no more."""
    decoder = msgspec.msgpack.Decoder(Task)
    while (frame := receive(stdin)) is not None:
        try:
            send(stdout, Done(_run(decoder.decode(frame), lambda *came: send(stdout, Came(*came)))))
        except TreadleError as error:
            send(stdout, Refusal(error.code, str(error)))
        except TOO_LARGE as error:
            refused = too_large(error)
            send(stdout, Refusal(refused.code, str(refused)))


def _run(task: Task, progress: Callable[[float, int], None]) -> ReplicaResult:
    columns: dict[str, Any] = {name: np.frombuffer(data, kind) for name, (kind, data) in task.columns.items()}
    workload = Workload(**columns, tenants=task.tenants, prompts=task.prompts)
    config = config_from_log(task.config)
    return Replica(config, task.costs, workload, overhead=task.overhead, progress=progress).run()


def send(pipe: IO[bytes], message: msgspec.Struct) -> None:
    payload = msgspec.msgpack.encode(message)
    pipe.write(_LENGTH.pack(len(payload)))
    pipe.write(payload)
    pipe.flush()


def receive(pipe: IO[bytes]) -> bytes | None:
    """None when the other side has closed it."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    payload = pipe.read(_LENGTH.unpack(head)[0])
    return payload
