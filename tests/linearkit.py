"""Products of few rows by definition, in float64, with what may not be read or written poisoned."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Extras:
    """What is done beside the product."""

    norm: bool = False
    gated: bool = False
    add: bool = False
    bias: bool = False


PLAIN, NORM, GATED = Extras(), Extras(norm=True), Extras(norm=True, gated=True)
ADD, BIAS, GATED_BIAS = Extras(add=True), Extras(norm=True, bias=True), Extras(gated=True, bias=True)
EVERY = [PLAIN, NORM, GATED, ADD, BIAS, GATED_BIAS]


class Product:
    """A product of `rows` rows. Beyond them x is NaN; around `out`, a part of a larger tensor, all must stay NaN."""

    def __init__(self, rows: int, out: int, width: int, extras: Extras, dtype: torch.dtype, device: torch.device):
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self.extras = extras
        self.weight = random(2 * out if extras.gated else out, width) * width**-0.5
        self.norm = random(width) if extras.norm else None
        self.bias = random(self.weight.shape[0]) if extras.bias else None
        padded = torch.full((rows + 3, width), math.nan, dtype=dtype, device=device)
        padded[:rows] = random(rows, width) * 3
        self.x = padded[:rows]
        self._around = torch.full((rows + 2, out + 16), math.nan, dtype=dtype, device=device)
        self.out = self._around[1 : rows + 1, :out]
        if extras.add:
            self.out.copy_(random(rows, out))
        self.expected = self._by_definition()

    def _by_definition(self) -> Tensor:
        x = self.x.double()
        if self.norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.double()
        y = x @ self.weight.double().T
        if self.bias is not None:
            y += self.bias.double()
        if self.extras.gated:
            gate, up = y.chunk(2, -1)
            y = torch.nn.functional.silu(gate) * up
        return y + self.out.double() if self.extras.add else y

    def check(self) -> None:
        found, exact = self.out.double(), self.expected
        unit = torch.finfo(self.out.dtype).eps
        # One rounding of the result, and of every x * norm that went into it, or into both of its factors.
        slack = unit * (3 if self.extras.gated else 1) * (exact.abs() + exact.square().mean().sqrt())
        assert bool(((found - exact).abs() <= slack).all()), float(((found - exact).abs() / slack).max())
        outside = self._around.clone()
        outside[1:-1, : self.out.shape[1]] = math.nan
        assert bool(outside.isnan().all())
