"""A linear layer on GPUs that hands few rows to kernels which do what stands around the product in the same launch."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import Hidden, Unnormed, normed

FEW_ROW_DTYPES = (torch.bfloat16, torch.float16)


class FewRowKernels(Protocol):
    """most_rows: above it there is nothing to ask for. row_kinds: numbers of rows that together meet every kernel."""

    most_rows: int
    row_kinds: tuple[int, ...]

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a product that is not gated would be done."""
        ...

    def __call__(
        self, x: Hidden, weight: Tensor, bias: Tensor | None, *, gated: bool = False, add: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """x [T, in] times weight [n, in], plus bias, into out [T, n] or a new tensor; None where cuBLAS is better.

        gated: the first half of weight are gates, the result is silu(gate) * other half, [T, n / 2]. add: to what out
        holds. out does not share memory with x.
        """
        ...


class FewRowLinear:
    """W: [out, in] on a GPU, 16 bits; see `linear.Linear`. Many rows go to cuBLAS."""

    def __init__(self, weight: Tensor, bias: Tensor | None, device: torch.device, kernels: FewRowKernels) -> None:
        self.weight_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.out_features = weight.shape[0]
        self._weight = weight.to(device).contiguous()
        self._bias = None if bias is None else bias.to(device)
        self._kernels = kernels

    def __call__(self, x: Hidden) -> Tensor:
        y = self.few(x)
        return F.linear(normed(x), self._weight, self._bias) if y is None else y

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()

    def into(self, x: Tensor, out: Tensor) -> None:
        if self.few(x, out=out) is not None:
            return
        if self._bias is not None:
            out.copy_(F.linear(x, self._weight, self._bias))
        else:
            torch.mm(x, self._weight.t(), out=out)

    def takes(self, x: Tensor) -> bool:
        """Whether `few` would do it."""
        return 0 < x.shape[0] <= self._kernels.most_rows and self._kernels.takes(x, self._weight)

    def few(self, x: Hidden, *, gated: bool = False, add: bool = False, out: Tensor | None = None) -> Tensor | None:
        """By the kernels for few rows alone; None, and nothing done, where they are not the ones to ask."""
        rows = (x.x if isinstance(x, Unnormed) else x).shape[0]
        if not 0 < rows <= self._kernels.most_rows:
            return None
        return self._kernels(x, self._weight, self._bias, gated=gated, add=add, out=out)
