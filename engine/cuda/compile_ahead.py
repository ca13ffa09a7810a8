"""`python -m treadle.engine.cuda.compile_ahead`: compiles a rank's kernels into Triton's cache, with no GPU in use.

A rank that starts cold has a dozen seconds of compiling before it, and its threads share Python's lock. This process
runs what `warm` runs, on a model of shapes without numbers, and notes what Triton is asked for instead of doing it;
then it forks, and its children compile from that list. The rank finds the results in the cache.
Whatever this process misses or gets wrong, the rank compiles itself: it costs time, never an answer.

On standard input: the frame of `Configure`. On standard output: seconds, as JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from treadle.engine.config import ModelConfig, load_config
from treadle.engine.early import identify_triton
from treadle.engine.flashinfer.modules import prebuilt
from treadle.engine.kernels.identity import settle
from treadle.engine.kv import KVCache
from treadle.engine.loading import parse_dtype
from treadle.engine.model import load_model
from treadle.engine.phases import Phases, process_age
from treadle.engine.sharding import shard_for
from treadle.engine.weights.source import Shape, check_slice, expected_shapes
from treadle.transport.codec import rank_codec
from treadle.transport.messages import Configure

from .build import make_program
from .warm import Echo, warm

_WORKERS = 16
# Those that take a core for more than half a second, the longest first: they begin first, so none is waited for alone.
_LONG = ("_prefill_kernel", "_decode_kernel", "search_round", "count_ties", "pick_best", "_matrix_kernel")
_CPU = torch.device("cpu")
_PR_SET_PDEATHSIG = 1
# Attributes of a device (CUDA driver API, CUdevice_attribute).
_MAJOR, _MINOR = 75, 76
Task = Callable[[], object]
Found: TypeAlias = dict[tuple[str, str], Any]
"""Kernels by name and specialisation (Triton's JSON), and for each the `JITFunction` whose `preload` compiles it."""


class NoDevice:
    """As much of a Triton driver as compiling for a GPU needs; nothing is launched. capability: 90 is Hopper's."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Shapes:
    """A `WeightSource` whose matrices have one column: nothing here multiplies them. (The "meta" device would import
    seconds of Python.)"""

    def __init__(self, config: ModelConfig) -> None:
        self._shapes = expected_shapes(config)

    def has(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def read(
        self, name: str, dtype: torch.dtype, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        shape = list(self._shapes[name])
        shape[dim] = check_slice(name, self._shapes[name], dim, start, stop) - start
        shape[1:] = [1 for _ in shape[1:]]
        return torch.empty(shape, dtype=dtype, device=_CPU)

    def blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> None:
        return None

    def fingerprint(self) -> str:
        return ""


@contextmanager
def noted() -> Iterator[Found]:
    """Inside, kernels are neither compiled nor launched; yields what was asked for, by name and specialisation."""
    found: Found = {}

    def note(*, fn: Any, compile: dict[str, Any], **others: object) -> bool:
        found.setdefault((fn.name, compile["specialization_data"]), fn.jit_function)
        return True

    knobs.runtime.jit_cache_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = None


def wanted(configure: Configure, capability: int) -> Found:
    """What rank 0 will need. Sets Triton's driver, so this process can launch nothing afterwards."""
    driver.set_active(NoDevice(capability))
    settle()
    path = Path(configure.model)
    config = dataclasses.replace(load_config(path), num_layers=1)
    dtype, kv_dtype = parse_dtype(configure.dtype), parse_dtype(configure.kv_dtype or configure.dtype)
    comm = Echo(configure.world_size)
    with torch.inference_mode():
        model = load_model(
            config,
            Shapes(config),
            comm,
            device=_CPU,
            dtype=dtype,
            kv_dtype=kv_dtype,
            native=False,
            pack=False,
            triton=True,
            attention="triton",
            max_rows=configure.max_num_seqs,
            max_positions=min(configure.max_model_len, config.max_position),
            fused_linears=configure.fused_linears,
            capability=divmod(capability, 10),
        )
        program = make_program(configure, model, comm, dtype=dtype, device=_CPU, kernels=True)
        shard = shard_for(config, 0, comm.world_size)
        kv = KVCache(config, shard, num_blocks=2, block_size=configure.block_size, dtype=kv_dtype, device=_CPU)
        with noted() as found:
            warm(program, kv, max_tokens=configure.max_num_batched_tokens, max_len=configure.max_model_len, threads=1)
            if comm.world_size > 1 and configure.fused_sums:
                _sums(comm.world_size, config.hidden_size, dtype)
    if configure.attention_backend in ("auto", "flashinfer") and prebuilt("fa3", config.head_dim) is not None:
        return {key: function for key, function in found.items() if key[0] != "_prefill_kernel"}
    return found


def _sums(world_size: int, hidden: int, dtype: torch.dtype) -> None:
    """Those over the ranks that take residual and norm along, and those that `make_sums` tries."""
    from treadle.engine.kernels.sums import MOST_PROGRAMS, sum_add_norm

    addresses = torch.zeros(world_size, dtype=torch.int64)
    many = MOST_PROGRAMS + 1  # each program takes two
    tried = ((1, 256, torch.bfloat16), (many, 256, torch.bfloat16))
    for rows, width, kind in ((1, hidden, dtype), (many, hidden, dtype), *tried):
        residual, out = torch.zeros((2, rows, width), dtype=kind).unbind()
        sum_add_norm(addresses, 0, 0, 0, residual, torch.zeros(width, dtype=kind), out, 1.0)


def tasks_for(found: Found) -> list[Task]:
    def compile_one(function: Any, data: str) -> None:
        from triton.backends.nvidia.driver import CudaLauncher

        kernel = function.preload(data)
        CudaLauncher(kernel.src, kernel.metadata)  # C code that starts it; compiled too

    def compile_driver() -> None:
        from triton.backends.nvidia.driver import CudaUtils

        CudaUtils()

    tasks: list[Task] = [compile_driver]
    for name, data in sorted(found, key=_place):
        tasks.append(partial(compile_one, found[name, data], data))
    return tasks


def _place(key: tuple[str, str]) -> int:
    return _LONG.index(key[0]) if key[0] in _LONG else len(_LONG)


def run_forked(tasks: Sequence[Task], workers: int) -> int:
    """Runs the tasks in children of this process, each the next one when it is free. Returns how many children failed.

    The list is a pipe with a byte for each task: whoever reads it has the task.
    """
    if len(tasks) > 256:
        raise ValueError(f"{len(tasks)} tasks: at most 256")
    reading, writing = os.pipe()
    os.write(writing, bytes(range(len(tasks))))
    os.close(writing)
    children = []
    for _ in range(min(workers, len(tasks))):
        child = os.fork()
        if child == 0:
            _work(tasks, reading)
        children.append(child)
    os.close(reading)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


def _work(tasks: Sequence[Task], reading: int) -> None:
    code = 1
    try:
        die_with_parent()
        while number := os.read(reading, 1):
            tasks[number[0]]()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def capability_of(device: int) -> int:
    """10 * major + minor, asked of the driver without taking the device into use; 0 without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    handle, values = ctypes.c_int(), []
    if library.cuInit(0) or library.cuDeviceGet(ctypes.byref(handle), device):
        return 0
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        library.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        values.append(value.value)
    return 10 * values[0] + values[1]


def main() -> int:
    die_with_parent()
    answer = os.dup(1)
    os.dup2(2, 1)  # compilers may talk
    phases = Phases(process_age())
    phases.end("imports")
    configure = rank_codec().decode(sys.stdin.buffer.read())
    capability = capability_of(0)
    if not isinstance(configure, Configure) or capability == 0:
        return 1
    identifying = identify_triton()
    tasks = tasks_for(wanted(configure, capability))
    identifying.join()  # once, for all children
    phases.end("list")
    failed = run_forked(tasks, min(_WORKERS, len(os.sched_getaffinity(0))))
    phases.end(f"{len(tasks)} compiled")
    os.write(answer, msgspec.json.encode(phases.seconds))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
