"""The Triton kernels between the matrix products against `TorchOps`, which rounds where they must."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from . import tritonkit
from .tritonkit import DEVICE

from treadle.engine.kernels.elementwise import TritonOps  # isort: skip
from treadle.engine.ops import HeadLayout, KVSlots, TorchOps  # isort: skip

assert tritonkit  # the kernels above were declared after it

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OURS, REFERENCE = TritonOps(), TorchOps()


def check(found: Tensor, expected: Tensor, rounded_to: torch.dtype | None = None) -> None:
    """Sums are taken in another order, so here and there a result falls on the other side of a rounding.

    rounded_to: what results or what they are made of have been rounded to; their own dtype if None.
    """
    assert found.dtype is expected.dtype and found.shape == expected.shape
    rounded_to = rounded_to or found.dtype
    if rounded_to is torch.float32:
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=5e-6)
        return
    torch.testing.assert_close(
        found, expected, rtol=8 * torch.finfo(rounded_to).eps, atol=8 * torch.finfo(rounded_to).eps
    )
    assert (found != expected).sum() <= 0.05 * found.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 576), (5, 96), (2, 2048), (0, 64)], ids=str)
def test_norms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(shape[1], device=DEVICE).to(dtype)
    check(OURS.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    expected_sum = residual.clone()
    expected = REFERENCE.add_rms_norm(x.clone(), expected_sum, weight, 1e-5)
    check(OURS.add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_sum)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 3072), (5, 2 * 1030), (0, 64)], ids=str)
def test_silu_mul(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up = (torch.randn(shape, device=DEVICE) * 4).to(dtype)
    check(OURS.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


def test_silu_of_large_numbers() -> None:
    gate_up = torch.tensor([[-1e4, -90.0, 90.0, 1e4, 2.0, 2.0, 2.0, 2.0]], device=DEVICE)
    check(OURS.silu_mul(gate_up), REFERENCE.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("heads", [(1, 1, 64), (9, 3, 64), (7, 1, 24), (32, 8, 128), (10, 2, 40)], ids=str)
def test_rope_store(dtype: torch.dtype, norm: bool, heads: tuple[int, int, int]) -> None:
    q_heads, kv_heads, dim = heads
    tokens, block_size, cache_dtype = 5, 16, torch.float32 if norm else dtype
    qkv = torch.randn(tokens, (q_heads + 2 * kv_heads) * dim, device=DEVICE).to(dtype)
    weights = [torch.randn(dim, device=DEVICE).to(dtype) if norm else None for _ in range(2)]
    layout = HeadLayout(q_heads, kv_heads, dim, 1e-6, *weights)
    angles = torch.rand(50, dim // 2, device=DEVICE) * 6
    rope = (angles.cos(), angles.sin())
    positions = torch.tensor([0, 49, 7, 8, 21], device=DEVICE)
    slots = torch.tensor([16, 95, 33, 48, 31], device=DEVICE)
    caches = [torch.full((6, kv_heads, block_size, dim), math.nan, dtype=cache_dtype, device=DEVICE) for _ in range(4)]
    expected = REFERENCE.rope_store(qkv.clone(), layout, rope, positions, KVSlots(caches[0], caches[1], slots))
    found = OURS.rope_store(qkv, layout, rope, positions, KVSlots(caches[2], caches[3], slots))
    check(found, expected)
    written = torch.zeros(6, kv_heads, block_size, dim, dtype=torch.bool, device=DEVICE)
    written[slots // block_size, :, slots % block_size] = True
    for mine, reference in zip(caches[2:], caches[:2], strict=True):
        check(mine[written], reference[written], dtype)
        assert mine[~written].isnan().all()


def test_no_tokens() -> None:
    layout, none = HeadLayout(4, 2, 64, 1e-6), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    cache, table = torch.zeros(2, 2, 16, 64, device=DEVICE), torch.zeros(8, 32, device=DEVICE)
    found = OURS.rope_store(
        torch.zeros(0, 8 * 64, device=DEVICE), layout, (table, table), none, KVSlots(cache, cache, none)
    )
    assert found.shape == (0, 4, 64)
