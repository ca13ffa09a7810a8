"""From a `Configure` message to a rank that is ready to step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from treadle.errors import ConfigError, DoesNotFit
from treadle.transport.messages import Configure, Ready

from .comm import Communicator, make_comm
from .config import ModelConfig, load_config
from .kv import KVCache, bytes_per_block
from .model import load_model
from .native import load_native
from .rows import RowMirror
from .runner import Runner
from .sampling.sampler import Sampler
from .sampling.state import SamplingState
from .sharding import shard_for
from .weights import open_weights

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_CACHE_LIMIT = 4 << 30
_CPU_CACHE_SHARE = 0.25
_GPU_MEMORY_SHARE = 0.9
_NULL_BLOCKS = 1


@dataclass(slots=True)
class Loaded:
    runner: Runner
    comm: Communicator
    ready: Ready


def parse_dtype(name: str) -> torch.dtype:
    """Raises ConfigError that lists the names."""
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r}: allowed are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load(configure: Configure, rank: int) -> Loaded:
    """Builds everything a rank needs. Raises ModelError, ConfigError."""
    began = time.perf_counter()
    torch.set_num_threads(configure.threads)
    native = load_native() if configure.native else None
    if native is not None:
        native.keep_memory()
    device = _device(configure.device, rank)
    dtype, kv_dtype = parse_dtype(configure.dtype), parse_dtype(configure.kv_dtype or configure.dtype)
    path = Path(configure.model)
    config = load_config(path)
    source = open_weights(path, config, random=configure.random_weights, seed=configure.seed)
    comm = make_comm(
        rank,
        configure.world_size,
        device,
        init_method=configure.init_method,
        shared_dir=Path(configure.shared_dir),
        native=configure.native,
        timeout=configure.collective_timeout,
    )
    model = load_model(config, source, comm, device=device, dtype=dtype, kv_dtype=kv_dtype, native=configure.native)
    blocks, block_bytes = _blocks(configure, config, comm, kv_dtype, device)
    try:
        kv = KVCache(
            config,
            shard_for(config, rank, configure.world_size),
            num_blocks=blocks,
            block_size=configure.block_size,
            dtype=kv_dtype,
            device=device,
            poison=configure.debug,
        )
    except (RuntimeError, MemoryError, ValueError, OverflowError) as error:  # numpy's, for sizes beyond any machine
        raise DoesNotFit(
            f"{blocks} blocks of {block_bytes} bytes are a KV cache of {blocks * block_bytes / 1e9:,.1f} GB on this "
            "rank, which is more memory than there is; lower num_blocks or kv_cache_bytes"
        ) from error
    mirror = RowMirror(
        configure.max_num_seqs, configure.max_model_len, configure.block_size, blocks, debug=configure.debug
    )
    sampling = SamplingState(configure.max_num_seqs, config.vocab_size, device)
    sampler = Sampler(comm, model.vocab_start, model.vocab_local, config.vocab_size, sampling, device)
    comm.barrier()
    return Loaded(
        runner=Runner(model, kv, mirror, sampling, sampler, device),
        comm=comm,
        ready=Ready(
            rank=rank,
            fingerprint=source.fingerprint(),
            num_blocks=blocks,
            load_seconds=time.perf_counter() - began,
            weight_bytes=model.weight_bytes,
            kv_bytes=blocks * block_bytes,
            backend=model.backend_name,
        ),
    )


def _device(name: str, rank: int) -> torch.device:
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available() or torch.cuda.device_count() <= rank:
            raise ConfigError(f"device cuda: rank {rank} needs GPU {rank}, there are {torch.cuda.device_count()}")
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        return device
    raise ConfigError(f"device {name!r}: allowed are cpu and cuda")


def _blocks(
    configure: Configure, config: ModelConfig, comm: Communicator, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """(number of blocks, bytes of one on this rank), the number equal on all ranks though their shards may differ."""
    sizes = [
        bytes_per_block(config, shard_for(config, rank, comm.world_size), configure.block_size, dtype)
        for rank in range(comm.world_size)
    ]
    if configure.num_blocks:
        return configure.num_blocks, sizes[comm.rank]
    budget = configure.kv_cache_bytes or _free_bytes(device, comm)
    blocks = budget // max(sizes)
    if comm.world_size > 1 and not configure.kv_cache_bytes:
        shared = torch.tensor([blocks], dtype=torch.float32, device=device)
        blocks = int(comm.all_gather(shared).min().item())
    if blocks < _NULL_BLOCKS + 1:
        need = 2 * max(sizes)
        raise DoesNotFit(f"a KV cache of {budget} bytes: one block needs {max(sizes)}, so at least {need} are needed")
    rows_times_length = configure.max_num_seqs * -(-configure.max_model_len // configure.block_size)
    return min(blocks, rows_times_length + _NULL_BLOCKS), sizes[comm.rank]


def _free_bytes(device: torch.device, comm: Communicator) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - total * (1 - _GPU_MEMORY_SHARE))
    return min(_CPU_CACHE_LIMIT, int(_available_memory() * _CPU_CACHE_SHARE)) // comm.world_size


def _available_memory() -> int:
    """Bytes that can be taken without swapping; a fixed guess where /proc is missing."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 4 << 30
