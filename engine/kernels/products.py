"""`engine.linear_few.FewRowKernels` on NVIDIA GPUs: the table's choice for every product."""

from __future__ import annotations

import torch
from torch import Tensor

from treadle.engine.norm import Hidden, Unnormed

from .linear import linear, serves
from .linear_table import MOST_ROWS, LinearConfig, choose, row_kinds

_HOPPER = (9, 0)


class TritonProducts:
    def __init__(self, device: torch.device, capability: tuple[int, int] = _HOPPER) -> None:
        """device: a GPU, or a CPU where kernels are interpreted or only compiled, as on a GPU of this capability."""
        self.most_rows = MOST_ROWS
        self.row_kinds = row_kinds()
        self._capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else capability

    def __call__(
        self,
        x: Hidden,
        weight: Tensor,
        bias: Tensor | None,
        *,
        gated: bool = False,
        add: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | None:
        rows = x.x if isinstance(x, Unnormed) else x
        outputs = weight.shape[0] // 2 if gated else weight.shape[0]
        config = self._choice(rows, weight, outputs, gated)
        if config is None:
            return None
        if out is None:
            out = rows.new_empty((rows.shape[0], outputs))
        norm, eps = None, 0.0
        if isinstance(x, Unnormed):
            if rows.dtype is torch.bfloat16:
                norm, eps = x.norm.weight, x.norm.eps
            else:
                rows = x.taken()
        return linear(rows, weight, out, config, bias=bias, norm=norm, eps=eps, gated=gated, add=add)

    def takes(self, x: Tensor, weight: Tensor) -> bool:
        return self._choice(x, weight, weight.shape[0], False) is not None

    def _choice(self, x: Tensor, weight: Tensor, outputs: int, gated: bool) -> LinearConfig | None:
        config = choose(self._capability, x.shape[0], outputs, x.shape[1], gated)
        return config if serves(x, weight) else None
