"""Random rows over scattered pages that are poisoned wherever nothing was written, and attention by its definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class PagedRows:
    """Keys and values of several rows: (context, queries) each, in pages of which no row's are neighbours.

    The row at index i of a batch is row `rows[i]` of `table`. Slots that hold no key are NaN, in every page; entries of
    `table` past a row's end, and those of rows that are not in the batch, point to a page of NaN. queries: [T, q_heads,
    head_dim], a view into wider rows, as a model has it.
    """

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: tuple[int, int, int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.q_heads, self.kv_heads, self.dim = heads
        self.lengths = lengths
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-context // block_size) for context, _ in lengths]
        order = 2 + torch.randperm(sum(counts), generator=generator)
        shape = (2 + sum(counts), self.kv_heads, block_size, self.dim)
        k_cache, v_cache = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
        places = torch.randperm(len(lengths) + 3, generator=generator)[: len(lengths)]
        table = torch.ones(len(lengths) + 3, max(counts) + 1, dtype=torch.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for row, (context, _) in enumerate(lengths):
            first = sum(counts[:row])
            blocks = order[first : first + counts[row]]
            table[places[row], : counts[row]] = blocks.int()
            k, v = (torch.randn(context, self.kv_heads, self.dim, generator=generator).to(dtype) for _ in range(2))
            spot = torch.arange(context)
            k_cache[blocks[spot // block_size], :, spot % block_size] = k
            v_cache[blocks[spot // block_size], :, spot % block_size] = v
            self.keys.append(k.to(device))
            self.values.append(v.to(device))
        self.starts = [0]
        for _, queries in lengths:
            self.starts.append(self.starts[-1] + queries)
        wide = torch.randn(self.starts[-1], self.q_heads + 2 * self.kv_heads, self.dim, generator=generator) * 2
        self.queries = wide.to(dtype).to(device)[:, : self.q_heads]
        self.k_cache, self.v_cache, self.table = k_cache.to(device), v_cache.to(device), table.to(device)
        self.rows = places.int().to(device)
        self.context_lens = torch.tensor([context for context, _ in lengths], dtype=torch.int32, device=device)
        self.query_starts = torch.tensor(self.starts, dtype=torch.int32, device=device)
        self.max_query_len = max(queries for _, queries in lengths)
        self.max_context = max(context for context, _ in lengths)

    def poisoned_out(self) -> Tensor:
        shape = (self.starts[-1], self.q_heads * self.dim)
        return torch.full(shape, math.nan, dtype=self.queries.dtype, device=self.queries.device)

    def expected(self, scale: float, window: int | None) -> Tensor:
        """float64 [T, q_heads * head_dim]."""
        q = self.queries
        parts = zip(self.starts, self.starts[1:], self.keys, self.values, strict=False)
        return torch.cat([by_definition(q[start:stop], k, v, scale, window) for start, stop, k, v in parts])


def by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One row: q [T, H, D], k and v [L, KV heads, D]; the queries are the last T positions. No keys: zeros."""
    if k.shape[0] == 0:
        return torch.zeros(q.shape[0], q.shape[1] * q.shape[2], dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,lhd->htl", q.double(), k) * scale
    position = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device).unsqueeze(1)
    key = torch.arange(k.shape[0], device=q.device)
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, v).flatten(1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ over ‖expected‖; NaN if anything is."""
    found = found.detach().cpu().double()
    return float((found - expected.cpu().double()).norm() / expected.double().norm())


# Of results in a dtype: inputs are exact, so this is the rounding of weights and outputs (and sums).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
