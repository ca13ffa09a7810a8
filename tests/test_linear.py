"""Linear layers: every product there is gives x W^T + b, rounded once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from treadle.engine.linear import NativeLinear, Placement, TorchLinear, make_gated, make_linear
from treadle.engine.native import Native, load_native

# Outputs below, at and above a panel of 32, rows around a tile of 12 and a chunk of 96.
SHAPES = [(1, 2), (2, 6), (31, 64), (32, 576), (33, 96), (320, 34)]
ROWS = [1, 2, 11, 12, 13, 32, 96, 97, 200]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def native() -> Native:
    library = load_native()
    if library is None or not library.linear_elements(2, 2):
        pytest.skip("this processor has no products of bfloat16 vectors, or has better ones (AMX)")
    return library


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_native_product_is_exact_but_for_one_rounding(native: Native, out: int, inputs: int, biased: bool) -> None:
    weight, bias = random(out, inputs, seed=1), random(out, seed=2) if biased else None
    linear = NativeLinear(weight, bias, native)
    for rows in ROWS:
        x = random(rows, inputs, seed=rows)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert relative_error(linear.wide(x), expected) < 1e-5, rows
        assert torch.equal(linear(x), linear.wide(x).bfloat16()), rows


@pytest.mark.parametrize(("out", "inputs"), [(2, 2), (62, 64), (64, 576), (66, 96), (320, 34)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_gated_product_activates_the_rounded_halves(native: Native, out: int, inputs: int, biased: bool) -> None:
    weight, bias = random(out, inputs, seed=3), random(out, seed=4) if biased else None
    placement = Placement(CPU, torch.bfloat16, native=native)
    gated, plain = make_gated(weight, bias, placement), make_linear(weight, bias, placement)
    assert gated is not None
    for rows in ROWS:
        x = random(rows, inputs, seed=rows)
        gate, up = plain(x).double().chunk(2, dim=-1)
        assert relative_error(gated(x), torch.nn.functional.silu(gate) * up) < 4e-3, rows


def test_rows_may_be_slices_of_longer_ones(native: Native) -> None:
    linear = NativeLinear(random(40, 64, seed=5), None, native)
    long = random(14, 100, seed=6)
    assert torch.equal(linear(long[:, :64]), linear(long[:, :64].contiguous()))


def test_nothing_is_written_beyond_the_result(native: Native) -> None:
    """Panels and tiles are padded; the padding must not reach memory."""
    linear = NativeLinear(random(34, 64, seed=7), None, native)
    for rows in ROWS:
        memory = torch.full((rows * 34 + 64,), 7.0, dtype=torch.bfloat16)
        x = random(rows, 64, seed=8)
        linear._multiply(x, memory, 0)
        assert torch.equal(memory[: rows * 34].view(rows, 34), linear(x))
        assert bool((memory[rows * 34 :] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", [True, False])
def test_every_placement_gives_the_same_product(dtype: torch.dtype, pack: bool) -> None:
    weight, bias = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    placement = Placement(CPU, dtype, pack, load_native())
    linear = make_linear(weight, bias, placement)
    assert linear.weight_bytes == weight.nbytes + bias.nbytes
    x = torch.randn(5, 64).to(dtype)
    expected = x.double() @ weight.double().T + bias.double()
    assert relative_error(linear(x), expected) < 4 * torch.finfo(dtype).eps
    assert linear.wide(x).dtype is torch.float32
    assert relative_error(linear.wide(x), expected) < 4 * torch.finfo(dtype).eps


def test_what_serves_where(native: Native) -> None:
    """C for bfloat16 in one thread; the others have their libraries."""
    kinds = {
        (dtype, pack): Placement(CPU, dtype, pack, native).linears
        for dtype, pack in itertools.product((torch.bfloat16, torch.float16), (True, False))
    }
    assert kinds == {
        (torch.bfloat16, True): "native",
        (torch.bfloat16, False): "torch",
        (torch.float16, True): "torch",
        (torch.float16, False): "torch",
    }
    assert Placement(CPU, torch.bfloat16).linears != "native"
    torch.set_num_threads(2)
    assert Placement(CPU, torch.bfloat16, native=native).linears != "native"
    odd = random(4, 3, seed=9)
    assert isinstance(make_linear(odd, None, Placement(CPU, torch.float16)), TorchLinear)
