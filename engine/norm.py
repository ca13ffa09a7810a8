"""An RMS norm, and a hidden state that still waits for its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from .ops import Ops


@dataclass(frozen=True, slots=True)
class Norm:
    """weight: [hidden]."""

    weight: Tensor
    eps: float
    ops: Ops

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds x to residual in place and returns the norm of the sum, perhaps in x's memory."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Unnormed:
    """x [T, hidden] before `norm`, for a product that takes the norm while it reads x."""

    x: Tensor
    norm: Norm

    def taken(self) -> Tensor:
        return self.norm(self.x)


Hidden: TypeAlias = Tensor | Unnormed


def normed(x: Hidden) -> Tensor:
    return x.taken() if isinstance(x, Unnormed) else x
