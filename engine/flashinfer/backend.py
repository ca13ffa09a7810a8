"""Prefill through FlashInfer's FlashAttention-3 kernels, decoding through another backend.

FA3 (Shah et al. 2024) overlaps matrix products, softmax and loads on Hopper. FlashInfer's version reads pages through a
table. Its plan needs the lengths of the contexts on the host; that is why decode steps, which a CUDA graph replays and
of which the host knows as little as possible, are left to the other backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from treadle.engine.attention import AttentionBackend, AttentionPlan
from treadle.engine.batch import ForwardBatch
from treadle.errors import ConfigError

from .modules import Module, flashinfer_serves, load_module
from .staging import PlanBuffers, plan_bytes

_CAUSAL = 1
_HEADS_FIRST = 1
_NO_WINDOW = -1


@dataclass(frozen=True, slots=True)
class Heads:
    """What a rank's attention layers have in common."""

    q_heads: int
    kv_heads: int
    head_dim: int


class Buffers(Protocol):
    """See `PlanBuffers`."""

    def device_memory(self) -> Tensor: ...

    def take(self) -> Tensor: ...

    def copied(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class FlashInferPlan(AttentionPlan):
    """`tables` [R, P] int32 are the prefill rows'. decode: of the other backend, for the rows before them.

    work: FlashInfer's description of what it wrote to `memory`, on the device. first_token: of the prefill rows.
    """

    decode: AttentionPlan | None
    work: Sequence[int]
    memory: Tensor
    first_token: int


class FlashInferAttention:
    """`engine.attention.AttentionBackend`. Nothing waits for the device if the batch knows its `context_lens_host`."""

    def __init__(self, decode: AttentionBackend, module: Module, buffers: Buffers, heads: Heads, scale: float) -> None:
        self._decode = decode
        self._module = module
        self._buffers = buffers
        self._heads = heads
        self._scale = scale
        self.name = f"flashinfer prefill, {decode.name} decode"
        # FA3 splits no contexts, so it needs no memory for parts; it only asks this tensor for its device.
        self._no_parts = torch.empty(16, dtype=torch.uint8, device=buffers.device_memory().device)

    def plan(self, batch: ForwardBatch, block_size: int, dtype: torch.dtype) -> AttentionPlan:
        first = batch.num_decode
        if first == batch.num_rows:
            return self._decode.plan(batch, block_size, dtype)
        decode = self._decode.plan(_rows_before(batch, first), block_size, dtype) if first else None
        tables = batch.tables(block_size)[first:]
        lengths = _lengths(batch)[first:]
        offset = batch.query_starts[first]
        starts = torch.tensor([start - offset for start in batch.query_starts[first:]], dtype=torch.int32)
        # The kernel reads a row's pages from where it begins and stops at its length: the table is used as it is.
        pages = torch.arange(len(lengths) + 1, dtype=torch.int32) * tables.shape[1]
        heads, memory = self._heads, self._buffers.device_memory()
        work = self._module.plan(
            self._no_parts,
            memory,
            self._buffers.take(),
            starts,
            pages,
            torch.tensor(lengths, dtype=torch.int32),
            batch.num_tokens - offset,
            len(lengths),
            heads.q_heads,
            heads.kv_heads,
            block_size,
            False,  # CUDA graphs
            heads.head_dim,
            heads.head_dim,
            True,  # causal
            _NO_WINDOW,
        )
        self._buffers.copied()
        return FlashInferPlan(
            num_decode=first,
            tables=tables,
            lengths=batch.context_lens[first:],
            decode=decode,
            work=work,
            memory=memory,
            first_token=offset,
        )

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
        if not isinstance(plan, FlashInferPlan):
            return self._decode.attend(q, k_cache, v_cache, plan)
        tokens, heads, dim = q.shape
        out = q.new_empty((tokens, heads * dim))
        first = plan.first_token
        if plan.decode is not None:
            out[:first] = self._decode.attend(q[:first], k_cache, v_cache, plan.decode)
        unused = plan.lengths  # the kernel has these arrays from the plan
        self._module.paged_run(
            self._no_parts,
            plan.memory,
            plan.work,
            q[first:],
            k_cache,
            v_cache,
            unused,
            unused,
            plan.tables,
            unused,
            out[first:].view(-1, heads, dim),
            None,  # log-sum-exp
            _CAUSAL,
            _HEADS_FIRST,
            _NO_WINDOW,
            False,  # programmatic dependent launch
            None,
            None,
            None,  # several items in one prompt
            None,  # scale of the values
            0.0,  # soft cap
            self._scale,
            1.0,  # scale of the values
            0,
        )
        return out


def flashinfer_attention(
    decode: AttentionBackend,
    heads: Heads,
    device: torch.device,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    scale: float,
    window: int | None,
) -> FlashInferAttention:
    """`decode` with prefill through FlashInfer. Raises ConfigError where it cannot serve; `flashinfer_serves` asks."""
    if not flashinfer_serves(device, dtype, kv_dtype, heads.head_dim, window):
        raise ConfigError(
            "attention_backend='flashinfer' needs a Hopper GPU, bfloat16, a head size of 64 or 128, no sliding window, "
            "and either TREADLE_FLASHINFER_MODULES or the extra [flashinfer]"
        )
    module = load_module("fa3", heads.head_dim)
    return FlashInferAttention(decode, module, PlanBuffers(device, plan_bytes(heads.q_heads)), heads, scale)


def _lengths(batch: ForwardBatch) -> list[int]:
    if batch.context_lens_host is not None:
        return batch.context_lens_host
    lengths: list[int] = batch.context_lens.tolist()
    return lengths


def _rows_before(batch: ForwardBatch, count: int) -> ForwardBatch:
    """The first `count` rows of a batch, which are its decode rows."""

    def cut(tensor: Tensor | None, size: int) -> Tensor | None:
        return None if tensor is None else tensor[:size]

    return replace(
        batch,
        token_ids=batch.token_ids[:count],
        positions=batch.positions[:count],
        slots=batch.slots[:count],
        query_starts=batch.query_starts[: count + 1],
        context_lens=batch.context_lens[:count],
        context_lens_host=None if batch.context_lens_host is None else batch.context_lens_host[:count],
        block_tables=cut(batch.block_tables, count),
        num_decode=count,
        rows=cut(batch.rows, count),
        query_starts_device=cut(batch.query_starts_device, count + 1),
        max_query_len=1,
    )
