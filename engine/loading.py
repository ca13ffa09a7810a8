"""From a `Configure` message to a rank that is ready to step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from treadle.errors import ConfigError, DoesNotFit
from treadle.transport.mask_pages import MaskPages
from treadle.transport.messages import Configure, Ready

from .backends import has_triton
from .comm import Communicator, make_comm
from .config import ModelConfig, load_config
from .cuda import build, memory
from .cuda.late_kernels import LateKernels
from .cuda.program import StepProgram
from .cuda.runner import CudaRunner
from .cuda.warm import warm
from .early import Start, identify_triton
from .host_memory import host_blocks, make_copies, reserve_staging
from .kv import KVCache, bytes_per_block
from .model import Decoder, load_model
from .native import load_native
from .rows import RowMirror
from .runner import Runner
from .sampling.sampler import Sampler
from .sampling.state import SamplingState
from .sharding import shard_for
from .swap import BlockCopies, measure
from .weights import WeightSource, open_weights
from .weights.counted import Counted

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_CACHE_LIMIT = 4 << 30
_CPU_CACHE_SHARE = 0.25
_NULL_BLOCKS = 1
# Tokens of a step that is large enough to make all that stays.
_SMALL_STEP = 256
Emulate: TypeAlias = Literal["", "rows", "kernels"]
_WITHOUT_NATIVE = "the kernels for this CPU could not be compiled, and the slower ones of torch are used"


@dataclass(slots=True)
class Loaded:
    runner: Runner | CudaRunner
    comm: Communicator
    ready: Ready


def parse_dtype(name: str) -> torch.dtype:
    """Raises ConfigError that lists the names."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r}: allowed are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load(configure: Configure, rank: int, *, emulate: Emulate = "", start: Start | None = None) -> Loaded:
    """Builds everything a rank needs. Raises ModelError, ConfigError, DoesNotFit.

    emulate: on a CPU, do as on a GPU: "rows" lie beside the model and steps overlap; "kernels" are Triton's besides,
    which needs its interpreter. For tests. start: takes the times and the progress, and has what was begun before.
    """
    return _Loading(configure, rank, emulate, start or Start()).run()


class _Loading:
    """One rank's start; each method is one part of it."""

    def __init__(self, configure: Configure, rank: int, emulate: Emulate, start: Start) -> None:
        torch.set_num_threads(configure.threads)
        self._slow = ""
        if configure.native and configure.device == "cpu":  # GPUs do not wait for gcc
            native = load_native()
            if native is not None:
                native.keep_memory()
            else:
                self._slow = _WITHOUT_NATIVE
        self._configure = configure
        self._rank = rank
        self._start = start
        self._profiled = False
        self._late: LateKernels | None = None
        self._identifying = identify_triton() if configure.device == "cuda" and has_triton() else None
        self._device = _device(configure.device, rank)
        self._kernels = has_triton() if self._device.type == "cuda" else emulate == "kernels"
        self._device_rows = self._kernels or emulate == "rows"
        self._dtype = parse_dtype(configure.dtype)
        self._kv_dtype = parse_dtype(configure.kv_dtype or configure.dtype)

    def run(self) -> Loaded:
        began = time.perf_counter()
        self._ended("device")
        if self._device.type == "cuda" and self._kernels:
            from .kernels.identity import settle

            settle()  # so that it finds what the compiler compiles
            self._ended("kernels")
        configure, device = self._configure, self._device
        path = Path(configure.model)
        config = load_config(path)
        host = host_blocks(configure, self._sizes(config), available_memory())  # before any rank takes some
        source = open_weights(path, config, random=configure.random_weights, seed=configure.seed, device=device)
        comm = self._group()
        model = self._model(config, source, comm)
        program = self._program(config, model, comm)
        staging = reserve_staging(host, self._sizes(config)[self._rank], self._device) if self._device_rows else None
        blocks, block_bytes = self._blocks(config, comm, program)
        try:
            kv = self._cache(config, blocks, poison=configure.debug)
        except (RuntimeError, MemoryError, ValueError, OverflowError) as error:  # numpy's, for sizes beyond any machine
            raise _too_many(blocks, block_bytes) from error
        self._ended("cache")
        copies = make_copies(kv, host, staging, poison=configure.debug)
        runner = self._runner(config, model, comm, kv, program, copies)
        out_seconds, in_seconds = measure(copies, blocks)
        if host:
            self._ended("host memory")
        self._ended("graphs" if program is not None else "runner")
        if self._late is not None:
            self._start.phases.seconds |= self._late.end()
        fingerprint = source.fingerprint()
        comm.barrier()
        self._ended("fingerprint")
        return Loaded(
            runner=runner,
            comm=comm,
            ready=Ready(
                rank=self._rank,
                fingerprint=fingerprint,
                num_blocks=blocks,
                load_seconds=time.perf_counter() - began,
                weight_bytes=model.weight_bytes,
                kv_bytes=blocks * block_bytes,
                backend=model.backend_name,
                phases=self._start.phases.seconds,
                swap_blocks=host,
                swap_out_seconds=out_seconds,
                swap_in_seconds=in_seconds,
                slow=self._slow,
            ),
        )

    def _group(self) -> Communicator:
        configure = self._configure
        comm = make_comm(
            self._rank,
            configure.world_size,
            self._device,
            init_method=configure.init_method,
            shared_dir=Path(configure.shared_dir),
            native=configure.native,
            fused=configure.fused_sums and self._kernels,
            side=configure.overlap_sums,
            timeout=configure.collective_timeout,
        )
        self._ended("group")
        return comm

    def _program(self, config: ModelConfig, model: Decoder, comm: Communicator) -> StepProgram | None:
        """Where rows lie beside the model; warm on a GPU."""
        if not self._device_rows:
            return None
        program = build.make_program(
            self._configure, model, comm, dtype=self._dtype, device=self._device, kernels=self._kernels
        )
        if self._device.type == "cuda":
            self._warm(program, config, comm)
        return program

    def _model(self, config: ModelConfig, source: WeightSource, comm: Communicator) -> Decoder:
        configure, device = self._configure, self._device
        on_gpu = device.type == "cuda"
        shard = shard_for(config, self._rank, comm.world_size)
        if on_gpu:
            memory.check_weights(config, shard, self._dtype, device, configure.gpu_memory_utilization)
        counted = Counted(source, memory.weight_bytes(config, shard, self._dtype), self._dtype, self._report)
        try:
            model = load_model(
                config,
                counted,
                comm,
                device=device,
                dtype=self._dtype,
                kv_dtype=self._kv_dtype,
                native=configure.native,
                triton=self._kernels,
                attention=configure.attention_backend,
                max_rows=configure.max_num_seqs,
                fused_linears=configure.fused_linears,
                max_positions=min(configure.max_model_len, config.max_position) if on_gpu else None,
            )
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(f"the weights do not fit into the memory of GPU {device.index}: {error}") from error
        self._ended("weights")
        counted.finish()
        return model

    def _report(self, done: int, total: int) -> None:
        if not done:
            self._ended("kernels")  # were chosen and imported before anything is read
        self._start.report(done, total)

    def _ended(self, phase: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._start.phases.end(phase)

    def _warm(self, program: StepProgram, config: ModelConfig, comm: Communicator) -> None:
        """Loads every kernel, once they are compiled: rank 0's compiler works for all ranks of the machine."""
        configure, phases = self._configure, self._start.phases
        self._ended("program")
        if self._start.compiler is not None:
            for name, seconds in self._start.compiler.wait().items():
                phases.seconds[f"+ {name}"] = seconds
        if self._identifying is not None:
            self._identifying.join()
        comm.barrier()
        self._ended("compiling")
        if self._kernels:
            self._late = LateKernels()
        tokens, length = configure.max_num_batched_tokens, configure.max_model_len
        warm(program, self._cache(config, 2), max_tokens=tokens, max_len=length)
        self._ended("warm-up")

    def _runner(
        self,
        config: ModelConfig,
        model: Decoder,
        comm: Communicator,
        kv: KVCache,
        program: StepProgram | None,
        copies: BlockCopies,
    ) -> Runner | CudaRunner:
        configure, device = self._configure, self._device
        mirror = RowMirror(
            configure.max_num_seqs, configure.max_model_len, configure.block_size, kv.num_blocks, debug=configure.debug
        )
        sampling = SamplingState(configure.max_num_seqs, config.vocab_size, device)
        sampler = Sampler(comm, model.vocab_start, model.vocab_local, config.vocab_size, sampling, device)
        runner: Runner | CudaRunner
        if program is None:
            runner = Runner(model, kv, mirror, sampling, sampler, device, copies)
        else:
            host = build.Host(mirror, sampling, sampler, copies)
            runner = build.make_runner(configure, program, kv, host, device, profiled=self._profiled)
        if configure.mask_slots and self._start.masks >= 0:
            rows, width = configure.max_num_seqs, configure.mask_words
            runner.pages = MaskPages(self._start.masks, configure.mask_slots, rows, width)
        return runner

    def _cache(self, config: ModelConfig, blocks: int, poison: bool = False) -> KVCache:
        return KVCache(
            config,
            shard_for(config, self._rank, self._configure.world_size),
            num_blocks=blocks,
            block_size=self._configure.block_size,
            dtype=self._kv_dtype,
            device=self._device,
            poison=poison,
        )

    def _blocks(self, config: ModelConfig, comm: Communicator, program: StepProgram | None) -> tuple[int, int]:
        """(number of blocks, bytes of one on this rank), the number equal on all ranks though their shards may
        differ."""
        configure, sizes = self._configure, self._sizes(config)
        if configure.num_blocks:
            return configure.num_blocks, sizes[comm.rank]
        least = (_NULL_BLOCKS + 1) * max(sizes)
        budget = configure.kv_cache_bytes or self._free_bytes(config, comm, program, least)
        blocks = budget // max(sizes)
        if comm.world_size > 1 and not configure.kv_cache_bytes:
            shared = torch.tensor([blocks], dtype=torch.float64, device=self._device)
            blocks = int(comm.all_gather(shared).min().item())
        if blocks < _NULL_BLOCKS + 1:
            raise DoesNotFit(
                f"a KV cache of {budget} bytes: one block needs {max(sizes)}, so at least {least} are needed"
            )
        rows_times_length = configure.max_num_seqs * -(-configure.max_model_len // configure.block_size)
        return min(blocks, rows_times_length + _NULL_BLOCKS), sizes[comm.rank]

    def _sizes(self, config: ModelConfig) -> list[int]:
        """Bytes of a block, by rank."""
        ranks, size = self._configure.world_size, self._configure.block_size
        return [bytes_per_block(config, shard_for(config, rank, ranks), size, self._kv_dtype) for rank in range(ranks)]

    def _free_bytes(self, config: ModelConfig, comm: Communicator, program: StepProgram | None, least: int) -> int:
        """What the cache may take on this rank."""
        configure, device = self._configure, self._device
        if device.type != "cuda":
            return min(_CPU_CACHE_LIMIT, int(available_memory() * _CPU_CACHE_SHARE)) // comm.world_size
        if program is not None:
            most, longest = configure.max_num_batched_tokens, configure.max_model_len

            def run(tokens: int) -> None:
                memory.largest_step(program, lambda blocks: self._cache(config, blocks), tokens, longest)

            try:
                memory.profile(partial(run, min(_SMALL_STEP, most)), partial(run, most), device)
                self._profiled = True
            except torch.OutOfMemoryError as error:
                raise DoesNotFit(
                    f"a step of max_num_batched_tokens={configure.max_num_batched_tokens} tokens and max_num_seqs="
                    f"{configure.max_num_seqs} samples does not fit beside the weights on GPU {device.index}: {error}"
                ) from error
            self._ended("profile")
        return memory.cache_bytes(device, configure.gpu_memory_utilization, least)


def _too_many(blocks: int, block_bytes: int) -> DoesNotFit:
    return DoesNotFit(
        f"{blocks} blocks of {block_bytes} bytes are a KV cache of {blocks * block_bytes / 1e9:,.1f} GB on "
        "this rank, which is more memory than there is; lower num_blocks or kv_cache_bytes"
    )


def _device(name: str, rank: int) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available() or torch.cuda.device_count() <= rank:
            raise ConfigError(f"device cuda: rank {rank} needs GPU {rank}, there are {torch.cuda.device_count()}")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        # Graphs cannot be captured on the default stream, and what is made for one stream is not made for another.
        torch.cuda.set_stream(torch.cuda.Stream(device))
        return device
    raise ConfigError(f"device {name!r}: allowed are cpu and cuda")


def available_memory() -> int:
    """Bytes that can be taken without swapping; a fixed guess where /proc is missing."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 4 << 30
