"""Which kernels a rank runs on."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from treadle.errors import ConfigError

from .attention import AttentionBackend, NativeAttention, TorchAttention
from .config import ModelConfig
from .linear_few import FewRowKernels
from .native import load_native
from .ops import NativeOps, Ops, TorchOps, native_serves
from .sharding import Shard


@dataclass(frozen=True, slots=True)
class Backends:
    """graphs: whether a decode step of these may stand in a CUDA graph. few: for products of few rows."""

    ops: Ops
    attention: AttentionBackend
    graphs: bool = False
    few: FewRowKernels | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What the kernels are for.

    native: allow the C kernels on CPUs. triton: take Triton's. attention: which of those that go with it, "auto" or a
    name. max_rows: of a step. capability: of the GPU, where the device is not it.
    """

    config: ModelConfig
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype
    native: bool = True
    triton: bool = False
    attention: str = "auto"
    max_rows: int = 1024
    capability: tuple[int, int] | None = None


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose_backends(request: Request) -> Backends:
    """The fastest that work here. Raises ConfigError for a backend that was asked for and is not installed."""
    config = request.config
    scale, window = config.head_dim**-0.5, config.sliding_window
    if request.triton:
        return _with_triton(request, scale, window)
    if request.device.type == "cuda" and request.attention not in ("auto", "torch"):
        raise ConfigError(f"attention_backend={request.attention!r}: it needs triton, which is not installed")
    library = None
    if request.native and native_serves(request.device, request.dtype, request.kv_dtype, config.head_dim):
        library = load_native()
    if library is None:
        return Backends(TorchOps(), TorchAttention(scale, window))
    return Backends(NativeOps(library, request.dtype), NativeAttention(library, scale, window))


def _with_triton(request: Request, scale: float, window: int | None) -> Backends:
    from .kernels.elementwise import TritonOps
    from .kernels.paged_attention import TritonAttention
    from .kernels.products import TritonProducts

    few = TritonProducts(request.device, request.capability or (9, 0))
    if request.attention == "torch":
        return Backends(TritonOps(), TorchAttention(scale, window), few=few)
    attention = TritonAttention(scale, window, request.max_rows)
    attention.prepare(request.shard.q_heads.size, request.config.head_dim, request.device)
    if request.attention == "flashinfer" or (request.attention == "auto" and _flashinfer_is_built(request, window)):
        return Backends(TritonOps(), _with_flashinfer(request, attention, scale, window), graphs=True, few=few)
    return Backends(TritonOps(), attention, graphs=True, few=few)


def _flashinfer_is_built(request: Request, window: int | None) -> bool:
    """Whether its prefill for Hopper lies ready; nothing is compiled for "auto"."""
    from .flashinfer.modules import flashinfer_serves, prebuilt

    head_dim = request.config.head_dim
    serves = flashinfer_serves(request.device, request.dtype, request.kv_dtype, head_dim, window)
    return serves and prebuilt("fa3", head_dim) is not None


def _with_flashinfer(request: Request, decode: AttentionBackend, scale: float, window: int | None) -> AttentionBackend:
    from .flashinfer import Heads, flashinfer_attention

    heads = Heads(request.shard.q_heads.size, request.shard.kv_heads.size, request.config.head_dim)
    return flashinfer_attention(
        decode, heads, request.device, dtype=request.dtype, kv_dtype=request.kv_dtype, scale=scale, window=window
    )
