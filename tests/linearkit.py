"""Products of few rows by definition, in float64, with what may not be read or written poisoned.

How far a result may be off. One rounding changes a number by r = eps / 2 of it at most. y = sum of w_k a_k; with L the
square root of the sum of (w_k a_k)^2, y is off by

- a norm taken along: every a_k was rounded, once. The errors are at most r |w_k a_k|, independent, of mean zero; for
  random numbers their standard deviation is 0.42 of that (ulp / sqrt(12), over the significands), so 3 r L is seven
  standard deviations of the sum;
- the sum in float32, on tensor cores that may cut what does not fit: a 2^-23 of a partial sum (about L) for each of
  width / 16 steps, 2^-13 L up to a width of 16,384.

A gated product silu(g) u with g off by d and u off by e is off by |silu'| d |u| + |silu(g)| e + |silu'| d e at most,
and |silu'| is below 1.1. At the end comes one rounding of what was computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-5
_ROUNDINGS, _SUM, _STEEPEST = 3.0, 2.0**-13, 1.1


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
        self.expected, self.slack = self._by_definition()

    def _by_definition(self) -> tuple[Tensor, Tensor]:
        """The exact result, and how far one may be off; see above."""
        x = self.x.double()
        r = torch.finfo(self.out.dtype).eps / 2
        if self.norm is not None:
            x = x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.double()
        y = x @ self.weight.double().T
        length = (x.float().square() @ self.weight.float().square().T).sqrt().double()
        off = length * (_SUM + (_ROUNDINGS * r if self.norm is not None else 0.0))
        if self.bias is not None:
            y += self.bias.double()
        if self.extras.gated:
            gate, up = y.chunk(2, -1)
            d, e = off.chunk(2, -1)
            silu = torch.nn.functional.silu(gate)
            y, off = silu * up, _STEEPEST * d * (up.abs() + e) + silu.abs() * e
        if self.extras.add:
            y = y + self.out.double()
        return y, off + r * (y.abs() + off) + torch.finfo(self.out.dtype).smallest_normal * r

    def check(self) -> None:
        wrong = (self.out.double() - self.expected).abs()
        assert bool((wrong <= self.slack).all()), float((wrong / self.slack).max())
        outside = self._around.clone()
        outside[1:-1, : self.out.shape[1]] = math.nan
        assert bool(outside.isnan().all())
