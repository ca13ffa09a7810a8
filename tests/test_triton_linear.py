"""Products of few rows in Triton, against float64, with norms, gates, biases and sums in the same launch."""

from __future__ import annotations

import pytest
import torch

from . import tritonkit
from .linearkit import ADD, EPS, EVERY, GATED, NORM, PLAIN, Extras, Product
from .tritonkit import DEVICE

from treadle.engine.kernels.linear import linear, serves  # isort: skip
from treadle.engine.kernels.linear_table import LinearConfig  # isort: skip

assert tritonkit  # the kernels above were declared after it

VECTOR = LinearConfig(rows=1, columns=8, depth=64, warps=4, stages=2)
MATRIX = LinearConfig(rows=8, columns=16, depth=32, warps=1, stages=2)
WIDE = LinearConfig(rows=16, columns=64, depth=64, warps=4, stages=2)


def multiply(product: Product, config: LinearConfig) -> None:
    extras = product.extras
    linear(
        product.x, product.weight, product.out, config,
        bias=product.bias, norm=product.norm, eps=EPS, gated=extras.gated, add=extras.add,
    )  # fmt: skip


@pytest.mark.parametrize("extras", EVERY, ids=str)
@pytest.mark.parametrize("config", [VECTOR, MATRIX, WIDE], ids=["vector", "matrix", "wide"])
def test_against_float64(config: LinearConfig, extras: Extras) -> None:
    """Sizes that tiles do not divide; rows from one to more than a program takes."""
    for rows, out, width in ((1, 40, 96), (3 if config.rows == 1 else config.rows + 1, 72, 128)):
        product = Product(rows, out, width, extras, torch.bfloat16, DEVICE)
        multiply(product, config)
        product.check()


@pytest.mark.parametrize("extras", [PLAIN, ADD, Extras(gated=True, bias=True)], ids=str)
@pytest.mark.parametrize("config", [VECTOR, MATRIX], ids=["vector", "matrix"])
def test_float16(config: LinearConfig, extras: Extras) -> None:
    product = Product(1 if config.rows == 1 else 4, 48, 64, extras, torch.float16, DEVICE)
    multiply(product, config)
    product.check()


@pytest.mark.parametrize("extras", [NORM, GATED], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(extras: Extras) -> None:
    product = Product(7, 48, 96, extras, torch.bfloat16, DEVICE)
    multiply(product, MATRIX)
    alone = torch.empty(1, 48, dtype=torch.bfloat16, device=DEVICE)
    weight, norm = product.weight, product.norm
    linear(product.x[4:5], weight, alone, MATRIX, norm=norm, eps=EPS, gated=extras.gated)
    assert torch.equal(alone[0], product.out[4])


def test_no_rows_and_what_is_not_served() -> None:
    weight = torch.zeros(32, 64, device=DEVICE)
    assert linear(weight[:0], weight, weight[:0, :32], MATRIX).shape == (0, 32)
    half = weight.bfloat16()
    assert serves(half[:2], half)
    assert not serves(weight[:2], weight)
    assert not serves(half[:2], weight)
    assert not serves(half.T[:2], half)
