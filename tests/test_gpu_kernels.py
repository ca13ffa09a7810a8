"""The Triton kernels on a GPU, at the shapes of real models; test_triton_*.py has the corner cases, for any machine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from . import tritonkit
from .attentionkit import TOLERANCE, PagedRows, by_definition, relative_error
from .linearkit import ADD, BIAS, EPS, GATED, NORM, PLAIN, Extras, Product
from .tritonkit import DEVICE

from treadle.engine.kernels.decode import (  # isort: skip
    DecodeConfig,
    choose_splits,
    decode_workspace,
    paged_decode,
)
from treadle.engine.kernels.elementwise import TritonOps  # isort: skip
from treadle.engine.kernels.linear import linear  # isort: skip
from treadle.engine.kernels.linear_table import MOST_ROWS, LinearConfig, choose  # isort: skip
from treadle.engine.kernels.prefill import PrefillConfig, paged_prefill  # isort: skip
from treadle.engine.ops import HeadLayout, KVSlots, TorchOps  # isort: skip

assert tritonkit  # the kernels above were declared after it
pytestmark = pytest.mark.gpu

SCALE = 128**-0.5
HEADS = {"8b": (32, 8, 128), "0.6b": (16, 8, 128), "135m": (9, 3, 64)}


def decode(rows: PagedRows, splits: int, window: int | None = None, config: DecodeConfig | None = None) -> Tensor:
    count, heads, dim = rows.queries.shape
    workspace = decode_workspace(count, heads, dim, max(splits, 2), DEVICE)
    out = rows.poisoned_out()
    paged_decode(
        rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.context_lens, out,
        scale=SCALE, window=window, num_splits=splits, workspace=workspace, config=config,
    )  # fmt: skip
    return out


def prefill(rows: PagedRows, window: int | None = None, config: PrefillConfig | None = None) -> Tensor:
    out = rows.poisoned_out()
    paged_prefill(
        rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.query_starts, rows.context_lens,
        rows.max_query_len, out, scale=SCALE, window=window, config=config,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize(("block_size", "window"), [(16, None), (16, 700), (64, None)])
def test_decode(model: str, block_size: int, window: int | None) -> None:
    lengths = [(context, 1) for context in (1, 15, 64, 127, 128, 129, 1000, 1024, 1025, 2500, 5003)]
    rows = PagedRows(lengths, HEADS[model], block_size, torch.bfloat16, DEVICE)
    expected = rows.expected(SCALE, window)
    for splits in (1, 2, 5, choose_splits(len(lengths), HEADS[model][1], 8192, 132), 64):  # one kernel for all but 1
        assert relative_error(decode(rows, splits, window), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize(("block_size", "window"), [(16, None), (16, 700), (128, None)])
def test_prefill(model: str, block_size: int, window: int | None) -> None:
    lengths = [(2048, 2048), (300, 300), (1500, 200), (3000, 7), (65, 65), (1, 1), (1100, 1024)]
    rows = PagedRows(lengths, HEADS[model], block_size, torch.bfloat16, DEVICE)
    assert relative_error(prefill(rows, window), rows.expected(SCALE, window)) < TOLERANCE[torch.bfloat16]
    few = PagedRows([(3000, 7), (40, 3)], HEADS[model], block_size, torch.bfloat16, DEVICE)
    assert relative_error(prefill(few, window), few.expected(SCALE, window)) < TOLERANCE[torch.bfloat16]


def test_wide_heads() -> None:
    rows = PagedRows([(700, 1), (90, 1)], (8, 4, 256), 16, torch.bfloat16, DEVICE)
    assert relative_error(decode(rows, 4), rows.expected(SCALE, None)) < TOLERANCE[torch.bfloat16]
    rows = PagedRows([(700, 300), (90, 90)], (8, 4, 256), 16, torch.bfloat16, DEVICE)
    assert relative_error(prefill(rows), rows.expected(SCALE, None)) < TOLERANCE[torch.bfloat16]


def test_parts_of_a_row_never_race() -> None:
    """The order in which parts finish must not show: equal results, bit for bit, again and again."""
    rows = PagedRows([(2000 + 37 * index, 1) for index in range(12)], HEADS["8b"], 16, torch.bfloat16, DEVICE)
    first = decode(rows, 16)
    assert relative_error(first, rows.expected(SCALE, None)) < TOLERANCE[torch.bfloat16]
    for _ in range(200):
        assert torch.equal(decode(rows, 16), first)


def test_a_cache_beyond_32_bits() -> None:
    """Keys and values in the last blocks of a cache of more than 2^31 elements."""
    blocks, dim, context = 2**31 // (256 * 128) + 8, 128, 700
    k_cache, v_cache = (torch.empty(blocks, 1, 256, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    pages = torch.tensor([blocks - 1, blocks - 2, blocks - 3], device=DEVICE)
    qkv = torch.randn(context, 6 * dim, device=DEVICE).bfloat16()
    keys, values = qkv[:, -2 * dim :].clone().view(context, 2, 1, dim).unbind(1)
    angles = torch.zeros(context, dim // 2, device=DEVICE)
    positions = torch.arange(context, device=DEVICE)
    slots = pages[positions // 256] * 256 + positions % 256
    target = KVSlots(k_cache, v_cache, slots)
    q = TritonOps().rope_store(qkv, HeadLayout(4, 1, dim, 1e-6), (angles.cos(), angles.sin()), positions, target)
    table, rows = pages.int().view(1, 3), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([context], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, context], dtype=torch.int32, device=DEVICE)
    out = torch.full((context, 4 * dim), math.nan, dtype=torch.bfloat16, device=DEVICE)
    expected = by_definition(q, keys, values, SCALE, None)
    paged_prefill(q, k_cache, v_cache, table, rows, starts, lengths, context, out, scale=SCALE, window=None)
    assert relative_error(out, expected) < TOLERANCE[torch.bfloat16]
    workspace = decode_workspace(1, 4, dim, 4, DEVICE)
    paged_decode(
        q[-1:], k_cache, v_cache, table, rows, lengths, out[:1],
        scale=SCALE, window=None, num_splits=4, workspace=workspace,
    )  # fmt: skip
    assert relative_error(out[:1], expected[-1:]) < TOLERANCE[torch.bfloat16]


def test_in_a_graph_with_other_lengths() -> None:
    """A captured step sees the lengths that are in memory when it is replayed."""
    rows = PagedRows([(900, 1)] * 4, HEADS["0.6b"], 16, torch.bfloat16, DEVICE)
    workspace, out = decode_workspace(4, 16, 128, 16, DEVICE), rows.poisoned_out()

    def step() -> None:
        paged_decode(
            rows.queries, rows.k_cache, rows.v_cache, rows.table, rows.rows, rows.context_lens, out,
            scale=SCALE, window=None, num_splits=16, workspace=workspace,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for contexts in ([900, 900, 900, 900], [1, 500, 129, 0], [77, 0, 0, 900]):
        rows.context_lens.copy_(torch.tensor(contexts, dtype=torch.int32))
        graph.replay()
        for row, context in enumerate(contexts):
            keys, values = rows.keys[row][:context], rows.values[row][:context]
            expected = by_definition(rows.queries[row : row + 1], keys, values, SCALE, None)
            torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("tokens", [1, 37, 4096])
@pytest.mark.parametrize(
    "sizes", [(4096, 32, 8, 128, 14336, False), (1024, 16, 8, 128, 3072, True), (576, 9, 3, 64, 1536, False)], ids=str
)
def test_elementwise(tokens: int, sizes: tuple[int, int, int, int, int, bool]) -> None:
    hidden, q_heads, kv_heads, dim, inner, norm = sizes
    ours, reference = TritonOps(), TorchOps()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE).bfloat16()

    def check(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=0.07)
        assert (found != expected).float().mean() < 0.02

    x, residual, weight = random(tokens, hidden), random(tokens, hidden), random(hidden)
    check(ours.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    other = residual.clone()
    expected = reference.add_rms_norm(x.clone(), other, weight, 1e-5)
    check(ours.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(other, residual)
    gate_up = random(tokens, 2 * inner)
    check(ours.silu_mul(gate_up), reference.silu_mul(gate_up))
    layout = HeadLayout(q_heads, kv_heads, dim, 1e-6, *((random(dim), random(dim)) if norm else (None, None)))
    angles = torch.rand(8192, dim // 2, device=DEVICE) * 6
    positions = torch.randint(0, 8192, (tokens,), device=DEVICE)
    slots = torch.randperm(8192, device=DEVICE)[:tokens]
    caches = [torch.zeros(512, kv_heads, 16, dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(4)]
    qkv, rope = random(tokens, (q_heads + 2 * kv_heads) * dim), (angles.cos(), angles.sin())
    expected = reference.rope_store(qkv.clone(), layout, rope, positions, KVSlots(caches[0], caches[1], slots))
    check(ours.rope_store(qkv, layout, rope, positions, KVSlots(caches[2], caches[3], slots)), expected)
    check(caches[2], caches[0])
    assert torch.equal(caches[3], caches[1])


def multiply(product: Product, config: LinearConfig) -> Tensor:
    extras = product.extras
    return linear(
        product.x, product.weight, product.out, config,
        bias=product.bias, norm=product.norm, eps=EPS, gated=extras.gated, add=extras.add,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("outputs", "inner", "extras"),
    [
        (6144, 4096, NORM), (4096, 4096, ADD), (14336, 4096, GATED), (4096, 14336, ADD), (128256, 4096, PLAIN),
        (4096, 1024, BIAS), (1024, 2048, ADD), (3072, 1024, GATED), (1024, 3072, ADD), (151936, 1024, PLAIN),
        (960, 576, NORM), (576, 1536, ADD), (1000, 520, GATED),
    ],
    ids=str,
)  # fmt: skip
def test_products_of_few_rows(outputs: int, inner: int, extras: Extras) -> None:
    """What the table chooses, for every number of rows it serves."""
    capability = torch.cuda.get_device_capability()
    for rows in (1, 2, 5, 8, 9, 16, 17, MOST_ROWS):
        config = choose(capability, rows, outputs, inner, extras.gated)
        if config is None:
            continue
        product = Product(rows, outputs, inner, extras, torch.bfloat16, DEVICE)
        multiply(product, config)
        product.check()


@pytest.mark.parametrize("rows", [1, 7, 16])
def test_products_among_others(rows: int) -> None:
    """Each reads what the one before wrote; again and again, the bits are the same."""
    sizes = [(1024, 1024, NORM), (1024, 1024, ADD), (3072, 1024, GATED), (1024, 3072, ADD)]
    products = [Product(rows, *size[:2], size[2], torch.bfloat16, DEVICE) for size in sizes]
    residual = torch.randn(rows, 1024, device=DEVICE).bfloat16()
    q, a, b, inner = products[0], products[1], products[3], products[2]

    def layer() -> Tensor:
        stream = residual.clone()
        tile = LinearConfig(1, 8, 512, 4, 4) if rows == 1 else LinearConfig(16, 32, 128, 2, 4)
        for _ in range(8):
            linear(stream, q.weight, q.out, tile, norm=q.norm, eps=EPS)
            linear(q.out, a.weight, stream, tile, add=True)
            linear(stream, inner.weight, inner.out, tile, norm=inner.norm, eps=EPS, gated=True)
            linear(inner.out, b.weight, stream, tile, add=True)
        return stream

    first = layer()
    assert bool(first.isfinite().all())
    for _ in range(50):
        assert torch.equal(layer(), first)
