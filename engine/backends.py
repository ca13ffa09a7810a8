"""Which kernels a rank runs on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from treadle.errors import ConfigError

from .attention import AttentionBackend, NativeAttention, TorchAttention
from .config import ModelConfig
from .native import load_native
from .ops import NativeOps, Ops, TorchOps, native_serves
from .sharding import Shard


@dataclass(frozen=True, slots=True)
class Backends:
    """graphs: whether a decode step of these may stand in a CUDA graph."""

    ops: Ops
    attention: AttentionBackend
    graphs: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """What the kernels are for. attention: "auto" or a name. native: allow the C kernels. max_rows: of a step."""

    config: ModelConfig
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    native: bool = True
    attention: str = "auto"
    max_rows: int = 1024


def choose_backends(request: Request) -> Backends:
    """The fastest that work here. Raises ConfigError for a backend that was asked for and is not installed."""
    config, device = request.config, request.device
    scale, window = config.head_dim**-0.5, config.sliding_window
    if device.type == "cuda":
        return _on_gpu(request, scale, window)
    library = None
    if request.native and native_serves(device, request.dtype, request.kv_dtype, config.head_dim):
        library = load_native()
    if library is None:
        return Backends(TorchOps(), TorchAttention(scale, window))
    return Backends(NativeOps(library, request.dtype), NativeAttention(library, scale, window))


def _on_gpu(request: Request, scale: float, window: int | None) -> Backends:
    if importlib.util.find_spec("triton") is None:
        if request.attention not in ("auto", "torch"):
            raise ConfigError(f"attention_backend={request.attention!r}: it needs triton, which is not installed")
        return Backends(TorchOps(), TorchAttention(scale, window))
    from .kernels.elementwise import TritonOps
    from .kernels.paged_attention import TritonAttention

    if request.attention == "torch":
        return Backends(TritonOps(), TorchAttention(scale, window))
    attention = TritonAttention(scale, window, request.max_rows)
    attention.prepare(request.shard.q_heads.size, request.config.head_dim, request.device)
    return Backends(TritonOps(), attention, graphs=True)
