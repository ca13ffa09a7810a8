"""The small operations between the matrix products, in C for CPUs and in torch for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .native import Native

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)
_MAX_HEAD_DIM = 1024


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """How a fused projection row is laid out: q_heads, then kv_heads of keys, then kv_heads of values.

    q_norm, k_norm: [head_dim] weights of an RMS norm per head before the rotation (Qwen3), or None.
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    eps: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KVSlots:
    """Where the keys and values of a step's tokens go in one layer; see `KVCache` and `ForwardBatch`."""

    k: Tensor
    v: Tensor
    slots: Tensor


class Ops(Protocol):
    """All tensors contiguous, of the model's dtype and device."""

    name: str

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden] over its root mean square, times weight [hidden] (Zhang and Sennrich 2019)."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Adds x to residual in place and returns the norm of the sum, perhaps in x's memory."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2n], the gate first, to silu(gate) * up [T, n]."""
        ...

    def rope_store(
        self, qkv: Tensor, layout: HeadLayout, rope: tuple[Tensor, Tensor], positions: Tensor, target: KVSlots
    ) -> Tensor:
        """Normalises (if asked) and rotates queries and keys, writes keys and values to the cache.

        qkv: [T, (q_heads + 2 kv_heads) * head_dim], may be overwritten. rope: cosines and sines, each float32
        [positions, head_dim / 2]. Returns the queries [T, q_heads, head_dim], perhaps a view into qkv.
        """
        ...


class TorchOps:
    """The reference, and the only one on GPUs. Rounds where transformers rounds."""

    name = "torch"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rope_store(
        self, qkv: Tensor, layout: HeadLayout, rope: tuple[Tensor, Tensor], positions: Tensor, target: KVSlots
    ) -> Tensor:
        heads = qkv.view(qkv.shape[0], -1, layout.head_dim)
        q, k, v = heads.split((layout.q_heads, layout.kv_heads, layout.kv_heads), dim=1)
        if layout.q_norm is not None and layout.k_norm is not None:
            q, k = self.rms_norm(q, layout.q_norm, layout.eps), self.rms_norm(k, layout.k_norm, layout.eps)
        cos, sin = rope[0][positions].unsqueeze(1), rope[1][positions].unsqueeze(1)
        block_size = target.k.shape[2]
        block, offset = target.slots // block_size, target.slots % block_size
        target.k[block, :, offset] = _rotate(k, cos, sin).to(target.k.dtype)
        target.v[block, :, offset] = v.to(target.v.dtype)
        return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [T, heads, head_dim]: element i pairs with i + head_dim / 2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class NativeOps:
    """The C kernels: float32 and bfloat16 on CPUs."""

    name = "native"

    def __init__(self, native: Native, dtype: torch.dtype) -> None:
        self._native = native
        self._bf16 = dtype is torch.bfloat16

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        rows, width = x.shape
        self._native.rms_norm(x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), rows, width, eps, self._bf16)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, width = x.shape
        pointer = x.data_ptr()  # x has served once it is added, so the result may take its place
        self._native.rms_norm(pointer, residual.data_ptr(), weight.data_ptr(), pointer, rows, width, eps, self._bf16)
        return x

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._native.silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width // 2, self._bf16)
        return out

    def rope_store(
        self, qkv: Tensor, layout: HeadLayout, rope: tuple[Tensor, Tensor], positions: Tensor, target: KVSlots
    ) -> Tensor:
        tokens, dim, q_heads = qkv.shape[0], layout.head_dim, layout.q_heads
        self._native.rope_store(
            qkv.data_ptr(),
            target.k.data_ptr(),
            target.v.data_ptr(),
            rope[0].data_ptr(),
            rope[1].data_ptr(),
            positions.data_ptr(),
            target.slots.data_ptr(),
            None if layout.q_norm is None else layout.q_norm.data_ptr(),
            None if layout.k_norm is None else layout.k_norm.data_ptr(),
            layout.eps,
            tokens,
            q_heads,
            layout.kv_heads,
            dim,
            target.k.shape[2],
            self._bf16,
        )
        return qkv[:, : q_heads * dim].view(tokens, q_heads, dim)


def native_serves(device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the C kernels can work with these; they do not convert between model and cache."""
    return device.type == "cpu" and dtype in _NATIVE_DTYPES and kv_dtype is dtype and head_dim <= _MAX_HEAD_DIM
