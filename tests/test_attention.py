"""Both attention backends against the definition, over scattered pages that are NaN wherever nothing was written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from treadle.engine.attention import AttentionBackend, NativeAttention, TorchAttention
from treadle.engine.batch import ForwardBatch
from treadle.engine.native import load_native

SCALE = 0.2
# (context, queries) per row: single tokens, page borders, whole prompts, prefixes, more than one chunk of queries.
DECODE = [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (131, 1)]
PREFILL = [(2, 2), (16, 16), (70, 70), (70, 5), (33, 32), (300, 300), (420, 290)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Pages:
    """Random keys and values of several rows, in pages of which no row's are neighbours; the rest is NaN."""

    def __init__(
        self, rows: list[tuple[int, int]], kv_heads: int, dim: int, block_size: int, dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        counts = [-(-context // block_size) for context, _ in rows]
        order = 1 + torch.randperm(sum(counts), generator=generator)
        shape = (1 + sum(counts), kv_heads, block_size, dim)
        self.k_cache, self.v_cache = (torch.full(shape, math.nan, dtype=dtype) for _ in range(2))
        self.tables = torch.zeros(len(rows), max(counts) + 1, dtype=torch.int32)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for row, (context, _) in enumerate(rows):
            first = sum(counts[:row])
            blocks = order[first : first + counts[row]]
            self.tables[row, : counts[row]] = blocks
            k, v = (torch.randn(context, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
            place = torch.arange(context)
            self.k_cache[blocks[place // block_size], :, place % block_size] = k
            self.v_cache[blocks[place // block_size], :, place % block_size] = v
            self.keys.append(k)
            self.values.append(v)


def batch_of(rows: list[tuple[int, int]], tables: Tensor) -> ForwardBatch:
    starts = [0]
    for _, queries in rows:
        starts.append(starts[-1] + queries)
    nothing = torch.zeros(starts[-1], dtype=torch.int64)
    return ForwardBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        query_starts=starts,
        context_lens=torch.tensor([context for context, _ in rows], dtype=torch.int32),
        max_context=max(context for context, _ in rows),
        block_tables=tables,
        num_decode=sum(queries == 1 for _, queries in rows),
        sample_index=nothing[:0],
    )


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One row in float64: q [T, H, D], k and v [L, KV heads, D]; the queries are the last T positions."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,lhd->htl", q.double(), k) * SCALE
    position = torch.arange(k.shape[0] - q.shape[0], k.shape[0]).unsqueeze(1)
    key = torch.arange(k.shape[0])
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, v).flatten(1)


def backend_of(name: str, window: int | None) -> AttentionBackend:
    if name == "torch":
        return TorchAttention(SCALE, window)
    native = load_native()
    if native is None:
        pytest.skip("no C compiler here")
    return NativeAttention(native, SCALE, window)


def check(
    backend: AttentionBackend, rows: list[tuple[int, int]], heads: tuple[int, int, int], **options: object
) -> None:
    q_heads, kv_heads, dim = heads
    window, dtype = options.get("window"), options.get("dtype", torch.float32)
    assert isinstance(dtype, torch.dtype) and (window is None or isinstance(window, int))
    pages = Pages(rows, kv_heads, dim, 16, dtype)
    batch = batch_of(rows, pages.tables)
    # As in the model, the queries are part of wider rows.
    wide = torch.randn(batch.num_tokens, q_heads + 2 * kv_heads, dim, generator=torch.Generator().manual_seed(2))
    q = (wide * 3).to(dtype)[:, :q_heads]
    found = backend.attend(q, pages.k_cache, pages.v_cache, backend.plan(batch, 16, dtype))
    parts = [q[start:stop] for start, stop in zip(batch.query_starts, batch.query_starts[1:], strict=False)]
    expected = [by_definition(*part, window) for part in zip(parts, pages.keys, pages.values, strict=True)]
    tolerance = 2e-5 if dtype is torch.float32 else 3e-2 if backend.name == "native" else 0.15
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 1, 24, 100])
def test_mixed_rows(name: str, dtype: torch.dtype, window: int | None) -> None:
    check(backend_of(name, window), DECODE + PREFILL, (6, 2, 64), window=window, dtype=dtype)


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "heads", [(1, 1, 64), (3, 3, 8), (7, 1, 24), (8, 2, 128), (10, 2, 40), (4, 1, 80), (2, 1, 96)], ids=str
)
def test_shapes_of_heads(name: str, dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    check(backend_of(name, None), [(1, 1), (45, 1), (37, 37), (50, 8)], heads, dtype=dtype)


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("rows", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_large_scores_do_not_overflow(name: str, rows: list[tuple[int, int]]) -> None:
    backend = backend_of(name, None)
    pages = Pages(rows, 2, 64, 16, torch.float32)
    batch = batch_of(rows, pages.tables)
    q = torch.full((batch.num_tokens, 4, 64), 1e4)
    found = backend.attend(q, pages.k_cache, pages.v_cache, backend.plan(batch, 16, torch.float32))
    assert found.isfinite().all()
