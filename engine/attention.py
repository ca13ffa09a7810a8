"""Attention over paged keys and values. A backend sees queries, pages and page tables, nothing else (D5)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import ForwardBatch
from .native import Native

# Queries of a prompt with a prefix are taken in chunks, so that the mask stays small beside the keys.
_QUERY_CHUNK = 256


@dataclass(frozen=True, slots=True)
class QueryChunk:
    """Queries [start, stop) of the flat batch see keys [first_key, keys) of their row; mask None means causal."""

    start: int
    stop: int
    first_key: int
    keys: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Queries [start, stop) of the flat batch are the last tokens of a context of `keys`.

    table: [P] int32, the row's blocks. chunks: how to take the queries, where the backend wants to be told.
    """

    start: int
    stop: int
    keys: int
    table: Tensor
    chunks: list[QueryChunk]


@dataclass(slots=True)
class AttentionPlan:
    """What is the same in every layer of a step. Decode rows: tables [R, P] int32, lengths [R] int32."""

    num_decode: int
    tables: Tensor
    lengths: Tensor
    prefill: list[PrefillRow] = field(default_factory=list)


class AttentionBackend(Protocol):
    """window: how many keys a query sees, itself included; None is all of them."""

    name: str

    def plan(self, batch: ForwardBatch, block_size: int, dtype: torch.dtype) -> AttentionPlan:
        """Prepares a step; `dtype` is that of the queries."""
        ...

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
        """q [T, q_heads, head_dim] over caches [blocks, kv_heads, block_size, head_dim] to [T, q_heads * head_dim].

        The keys and values of this step's tokens are already in the caches. q_heads is a multiple of kv_heads, and
        consecutive query heads share a KV head.
        """
        ...


class TorchAttention:
    """Grouped matrix products by KV head; runs wherever torch does."""

    name = "torch"
    _wants_chunks = True

    def __init__(self, scale: float, window: int | None) -> None:
        self._scale = scale
        self._window = window

    def plan(self, batch: ForwardBatch, block_size: int, dtype: torch.dtype) -> AttentionPlan:
        decode, tables = batch.num_decode, batch.tables(block_size)
        plan = AttentionPlan(decode, tables[:decode], batch.context_lens[:decode])
        if decode < batch.num_rows:
            masks = _MaskMaker(self._window, dtype, batch.token_ids.device)
            for row, keys in enumerate(batch.context_lens[decode:].tolist(), decode):
                start, stop, table = batch.query_starts[row], batch.query_starts[row + 1], tables[row]
                chunks = list(masks.chunks(start, stop, keys)) if self._wants_chunks else []
                plan.prefill.append(PrefillRow(start, stop, keys, table, chunks))
        return plan

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
        tokens, heads, dim = q.shape
        out = q.new_empty((tokens, heads * dim))
        if plan.num_decode:
            self._decode(q, k_cache, v_cache, plan, out)
        for row in plan.prefill:
            self._prefill(q, k_cache, v_cache, row, out)
        return out

    def _decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, out: Tensor) -> None:
        rows, (_, heads, dim), kv_heads = plan.num_decode, q.shape, k_cache.shape[1]
        k, v = _gather(k_cache, plan.tables.long(), q.dtype), _gather(v_cache, plan.tables.long(), q.dtype)
        queries = q[:rows].reshape(rows, kv_heads, heads // kv_heads, dim)
        lengths = plan.lengths.view(-1, 1)
        position = torch.arange(k.shape[2], device=q.device)
        hidden = position >= lengths
        if self._window is not None:
            hidden |= position < lengths - self._window
        scores = (queries @ k.transpose(-1, -2)).float() * self._scale
        weights = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1).to(q.dtype)
        # A weight of zero does not silence what is not a number, and unwritten slots may hold anything.
        mixed = weights @ v.masked_fill(hidden[:, None, :, None], 0)
        out[:rows] = mixed.reshape(rows, heads * dim)

    def _prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, row: PrefillRow, out: Tensor) -> None:
        (_, heads, dim), (_, kv_heads, block_size, _) = q.shape, k_cache.shape
        group = heads // kv_heads
        pages = row.table[: -(-row.keys // block_size)].long()
        k = _gather(k_cache, pages, q.dtype)[:, None, : row.keys].expand(-1, group, -1, -1)
        v = _gather(v_cache, pages, q.dtype)[:, None, : row.keys].expand(-1, group, -1, -1)
        for chunk in row.chunks:
            part = slice(chunk.start, chunk.stop)
            seen = slice(chunk.first_key, chunk.keys)
            queries = q[part].view(-1, kv_heads, group, dim).permute(1, 2, 0, 3)
            mixed = F.scaled_dot_product_attention(
                queries,
                k[:, :, seen],
                v[:, :, seen],
                attn_mask=chunk.mask,
                is_causal=chunk.mask is None,
                scale=self._scale,
            )
            out[part].view(-1, kv_heads, group, dim).copy_(mixed.permute(2, 0, 1, 3))


class NativeAttention(TorchAttention):
    """The C kernels, which read pages in place. Only on CPUs; the caches have the dtype of the queries."""

    name = "native"
    _wants_chunks = False

    def __init__(self, native: Native, scale: float, window: int | None) -> None:
        super().__init__(scale, window)
        self._native = native

    def _decode(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, out: Tensor) -> None:
        _, kv_heads, block_size, dim = k_cache.shape
        code = self._native.decode_attention(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            plan.tables.data_ptr(),
            plan.tables.shape[1],
            plan.lengths.data_ptr(),
            out.data_ptr(),
            plan.num_decode,
            q.shape[1],
            kv_heads,
            dim,
            block_size,
            self._scale,
            self._window or 0,
            q.dtype is torch.bfloat16,
        )
        if code:
            raise MemoryError("no memory for attention scores")

    def _prefill(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, row: PrefillRow, out: Tensor) -> None:
        _, kv_heads, block_size, dim = k_cache.shape
        code = self._native.prefill_attention(
            q[row.start].data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            row.table.data_ptr(),
            out[row.start].data_ptr(),
            row.stop - row.start,
            row.keys,
            q.shape[1],
            kv_heads,
            dim,
            block_size,
            self._scale,
            self._window or 0,
            q.dtype is torch.bfloat16,
        )
        if code:
            raise MemoryError(f"no memory to attend to {row.keys} tokens")


def _gather(cache: Tensor, tables: Tensor, dtype: torch.dtype) -> Tensor:
    """Pages [..., P] of a cache to [..., kv_heads, P * block_size, head_dim]."""
    pages = cache[tables].transpose(-4, -3)
    return pages.flatten(-3, -2).to(dtype)


class _MaskMaker:
    """Cuts rows into chunks and gives them masks.

    Whether a query sees a key depends only on how far apart they are, so every mask is a window into one matrix whose
    last row is the last query and whose last column is that query's own key.
    """

    def __init__(self, window: int | None, dtype: torch.dtype, device: torch.device) -> None:
        self._window = window
        self._dtype = dtype
        self._device = device
        self._base = torch.empty((0, 0), dtype=dtype, device=device)

    def chunks(self, start: int, stop: int, keys: int) -> Iterator[QueryChunk]:
        """The queries [start, stop) of the flat batch are the last ones of a context of `keys` tokens."""
        count = stop - start
        if count == keys and (self._window is None or keys <= self._window):
            yield QueryChunk(start, stop, 0, keys, None)
            return
        prefix = keys - count
        for offset in range(0, count, _QUERY_CHUNK):
            size = min(_QUERY_CHUNK, count - offset)
            last = prefix + offset + size
            first = 0 if self._window is None else max(0, last - size + 1 - self._window)
            yield QueryChunk(start + offset, start + offset + size, first, last, self._mask(size, last - first))

    def _mask(self, queries: int, keys: int) -> Tensor:
        if keys > self._base.shape[1]:
            self._base = self._build(max(keys, 2 * self._base.shape[1]))
        return self._base[-queries:, -keys:]

    def _build(self, keys: int) -> Tensor:
        query = torch.arange(_QUERY_CHUNK, device=self._device).unsqueeze(1) + (keys - _QUERY_CHUNK)
        key = torch.arange(keys, device=self._device)
        hidden = key > query
        if self._window is not None:
            hidden |= key <= query - self._window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, -math.inf)
