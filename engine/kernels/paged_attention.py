"""The Triton attention backend: decode rows and prefill rows of a step, over pages of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treadle.engine.attention import AttentionPlan
from treadle.engine.batch import ForwardBatch

from .decode import DecodeWorkspace, choose_splits, decode_workspace, paged_decode
from .prefill import paged_prefill
from .shapes import decode_config, sm_count

__all__ = [
    "DecodeWorkspace",
    "TritonAttention",
    "TritonPlan",
    "choose_splits",
    "decode_workspace",
    "paged_decode",
    "paged_prefill",
]

_MAX_SPLITS = 64


@dataclass(slots=True, kw_only=True)
class TritonPlan(AttentionPlan):
    """`tables` is the whole table, indexed by `rows` [R] int32; `lengths` [R] int32, `query_starts` [R + 1] int32."""

    rows: Tensor
    query_starts: Tensor | None
    max_query_len: int
    max_context: int


class TritonAttention:
    """`engine.attention.AttentionBackend` on NVIDIA GPUs; nothing in it waits for the device.

    max_rows: the most rows of a step whose contexts may be split; beyond it they are not.
    """

    name = "triton"

    def __init__(self, scale: float, window: int | None, max_rows: int = 1024) -> None:
        self._scale = scale
        self._window = window
        self._max_rows = max_rows
        self._workspace: DecodeWorkspace | None = None

    def prepare(self, q_heads: int, head_dim: int, device: torch.device) -> None:
        """Allocates what decoding needs, once. To be called before a graph is captured, if no step ran before."""
        if self._workspace is None:
            self._workspace = decode_workspace(self._max_rows, q_heads, head_dim, _MAX_SPLITS, device)

    def plan(self, batch: ForwardBatch, block_size: int, dtype: torch.dtype) -> TritonPlan:
        rows, table = batch.rows, batch.table
        if rows is None or table is None:
            table = batch.tables(block_size)
            rows = torch.arange(batch.num_rows, dtype=torch.int32, device=table.device)
        starts, longest = batch.query_starts_device, batch.max_query_len
        if starts is None and batch.num_decode < batch.num_rows:
            starts = torch.tensor(batch.query_starts, dtype=torch.int32, device=table.device)
            ends = batch.query_starts[1:]
            longest = max(stop - start for start, stop in zip(batch.query_starts, ends, strict=False))
        return TritonPlan(
            num_decode=batch.num_decode,
            tables=table,
            lengths=batch.context_lens,
            rows=rows,
            query_starts=starts,
            max_query_len=longest,
            max_context=batch.max_context,
        )

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """See `AttentionBackend.attend`; q may be a view into wider rows."""
        if not isinstance(plan, TritonPlan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        tokens, heads, dim = q.shape
        out = q.new_empty((tokens, heads * dim))
        decode = plan.num_decode
        if decode:
            self.prepare(heads, dim, q.device)
            kv_heads, sms = k_cache.shape[1], sm_count(q.device)
            config = decode_config(dim, q.dtype, decode * kv_heads, sms)
            splits = choose_splits(decode, kv_heads, plan.max_context, sms, config.programs)
            paged_decode(
                q[:decode],
                k_cache,
                v_cache,
                plan.tables,
                plan.rows[:decode],
                plan.lengths[:decode],
                out[:decode],
                scale=self._scale,
                window=self._window,
                num_splits=splits if decode <= self._max_rows else 1,
                workspace=self._workspace,
                config=config,
            )
        if decode < plan.rows.shape[0] and plan.query_starts is not None:
            paged_prefill(
                q,
                k_cache,
                v_cache,
                plan.tables,
                plan.rows[decode:],
                plan.query_starts[decode:],
                plan.lengths[decode:],
                plan.max_query_len,
                out,
                scale=self._scale,
                window=self._window,
            )
        return out
