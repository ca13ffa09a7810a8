"""The C kernels between the products against their torch references, and how the library comes to be."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.engine.native import Native, build, load_native
from treadle.engine.ops import HeadLayout, KVSlots, NativeOps, Ops, TorchOps

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
COMPILE = "from treadle.engine.native import load_native; print(load_native().path)"


@pytest.fixture(scope="module")
def native() -> Native:
    library = load_native()
    if library is None:
        pytest.skip("no C compiler here")
    return library


def near(found: Tensor, expected: Tensor) -> None:
    """In float32 a few units in the last place; in bfloat16 one, for the last rounding may go the other way."""
    rtol, atol = (2e-6, 1e-6) if found.dtype is torch.float32 else (2**-7, 1e-6)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@DTYPES
@pytest.mark.parametrize("width", [1, 15, 16, 96, 100, 576])
def test_rms_norm(native: Native, dtype: torch.dtype, width: int) -> None:
    x, weight = random(5, width, dtype=dtype), random(width, dtype=dtype, seed=1)
    near(NativeOps(native, dtype).rms_norm(x, weight, 1e-5), TorchOps().rms_norm(x, weight, 1e-5))


@DTYPES
@pytest.mark.parametrize("width", [7, 576])
def test_add_rms_norm(native: Native, dtype: torch.dtype, width: int) -> None:
    x, residual = random(3, width, dtype=dtype), random(3, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    outcomes = []
    for ops in (NativeOps(native, dtype), TorchOps()):
        sum_ = residual.clone()
        outcomes.append((ops.add_rms_norm(x.clone(), sum_, weight, 1e-6), sum_))
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    near(outcomes[0][0], outcomes[1][0])


@DTYPES
@pytest.mark.parametrize("width", [1, 16, 160, 771])
def test_silu_mul(native: Native, dtype: torch.dtype, width: int) -> None:
    gate_up = random(4, 2 * width, dtype=dtype) * 8
    near(NativeOps(native, dtype).silu_mul(gate_up), TorchOps().silu_mul(gate_up.float()).to(dtype))


def test_silu_mul_at_the_ends(native: Native) -> None:
    gates = torch.tensor([[-1e30, -1000.0, -87.0, -0.0, 0.0, 87.0, 1000.0, 1e30, float("nan")]])
    found = NativeOps(native, torch.float32).silu_mul(torch.cat((gates, torch.ones_like(gates)), 1))
    assert torch.equal(found[0, 3:8], gates[0, 3:8])
    assert found[0, 1:3].abs().max() < 1e-30
    assert found[0, 8].isnan()


def rope_outcome(ops: Ops, qkv: Tensor, layout: HeadLayout) -> tuple[Tensor, Tensor, Tensor]:
    block_size, tokens = 16, qkv.shape[0]
    caches = [torch.zeros(9, layout.kv_heads, block_size, layout.head_dim, dtype=qkv.dtype) for _ in range(2)]
    angles = torch.outer(torch.arange(200.0), 1.0 / 100 ** torch.linspace(0, 1, layout.head_dim // 2))
    positions = torch.arange(0, 7 * tokens, 7)
    slots = torch.randperm(9 * block_size, generator=torch.Generator().manual_seed(3))[:tokens]
    target = KVSlots(caches[0], caches[1], slots)
    q = ops.rope_store(qkv.clone(), layout, (angles.cos(), angles.sin()), positions, target)
    return q, caches[0], caches[1]


@DTYPES
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), [(6, 2, 64), (3, 3, 8), (4, 1, 128), (2, 1, 80), (5, 1, 6)])
def test_rope_store(native: Native, dtype: torch.dtype, norms: bool, q_heads: int, kv_heads: int, dim: int) -> None:
    weights = [random(dim, dtype=dtype, seed=seed) if norms else None for seed in (4, 5)]
    layout = HeadLayout(q_heads, kv_heads, dim, 1e-6, *weights)
    qkv = random(11, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    found, expected = (rope_outcome(ops, qkv, layout) for ops in (NativeOps(native, dtype), TorchOps()))
    for one, other in zip(found, expected, strict=True):
        # A rotation adds two products: where they cancel, the error is one of the products, not of the sum.
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6 if dtype is torch.float32 else 6e-2)
    assert torch.equal(found[2], expected[2])


def compile_in(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE],
        env=os.environ | {"TREADLE_CACHE": str(cache)} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_processes_that_start_together_share_one_library(tmp_path: Path, native: Native) -> None:
    paths = {process.communicate(timeout=120)[0].strip() for process in [compile_in(tmp_path) for _ in range(2)]}
    assert len(paths) == 1
    assert Path(paths.pop()).parent == tmp_path / "native"
    assert len(list((tmp_path / "native").glob("*.so"))) == 1


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TREADLE_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_there_is_a_reason_in_the_log(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING):
        assert build.try_load() is None
    assert compiler in caplog.text
    assert not list(fresh_cache.rglob("*.so"))


def test_a_damaged_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_bytes(b"not a library")
    with pytest.raises(OSError, match=r"x\.so"):
        Native(tmp_path / "x.so")
