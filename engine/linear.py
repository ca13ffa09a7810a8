"""y = x W^T + b on one rank, by the fastest product there is for the place where W lives."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_few import FEW_ROW_DTYPES, FewRowKernels, FewRowLinear
from .native import Native
from .weights import StoredBlocks
from .weights.dequantize import dequantize

# oneDNN lays weights out for this many rows; measured, the same layout is as good as any from 1 row to 1,024.
_PACK_ROWS = 32
_BF16, _FLOAT, _GATED = 0, 1, 2
# The stored forms that `native/linear_blocks.c` knows, and its names for them.
_FORMS: Mapping[str, int] = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2}


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights live. pack: lay linear weights out for the processor where that is supported.

    native: the C kernels, or None where they are not wanted or do not work. few: kernels for few rows, likewise.
    """

    device: torch.device
    dtype: torch.dtype
    pack: bool = True
    native: Native | None = None
    few: FewRowKernels | None = None

    @property
    def linears(self) -> str:
        """ "native" (C, bfloat16, one thread), "oneDNN", "torch", or "few-row" (beside torch's)."""
        if self.few is not None and self.dtype in FEW_ROW_DTYPES:
            return "few-row"
        if not self.pack or self.device.type != "cpu":
            return "torch"
        # The C product runs in one thread, and leaves processors with matrix tiles to oneDNN.
        native = self.native is not None and self.native.linear_elements(2, 2) > 0
        if native and self.dtype is torch.bfloat16 and torch.get_num_threads() == 1:
            return "native"
        if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
            return "torch"
        if self.dtype is torch.bfloat16:
            return "oneDNN" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "torch"
        return "oneDNN" if self.dtype is torch.float32 else "torch"

    @property
    def blocks(self) -> bool:
        """Whether few rows may be multiplied with weights as a GGUF stores them."""
        one = self.dtype is torch.bfloat16 and torch.get_num_threads() == 1
        return self.native is not None and one and self.linears in ("native", "oneDNN")


def usable_blocks(parts: Sequence[StoredBlocks | None], placement: Placement) -> StoredBlocks | None:
    """The parts below each other, where `make_linear` can use them as they are; None where it needs numbers."""
    first = parts[0]
    if first is None or placement.native is None or not placement.blocks or first.form.name not in _FORMS:
        return None
    rows = []
    for part in parts:
        if part is None or part.form != first.form:
            return None
        rows.append(part.data)
    stacked = StoredBlocks(np.concatenate(rows) if len(rows) > 1 else rows[0], first.form)
    return stacked if placement.native.blocks_bytes(*stacked.shape, _FORMS[first.form.name]) else None


class Linear(Protocol):
    """W: [out, in]. weight_bytes: what W and b take. out_features: out."""

    weight_bytes: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, in], rows contiguous, to [T, out] of the same dtype."""
        ...

    def wide(self, x: Tensor) -> Tensor:
        """The same as float32."""
        ...

    def into(self, x: Tensor, out: Tensor) -> None:
        """The same into out [T, out], of x's dtype; without a copy where the product allows."""
        ...


class TorchLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None, placement: Placement) -> None:
        self.weight_bytes = _bytes(weight, bias)
        self.out_features = weight.shape[0]
        self._weight = weight.to(placement.device)
        self._bias = None if bias is None else bias.to(placement.device)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()

    def into(self, x: Tensor, out: Tensor) -> None:
        if self._bias is not None:
            out.copy_(self(x))
        else:
            torch.mm(x, self._weight.t(), out=out)


class OneDnnLinear:
    """float32, or bfloat16 where the processor has instructions for it."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight_bytes = _bytes(weight, bias)
        self.out_features = weight.shape[0]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()

    def into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(self(x))


class NativeLinear:
    """bfloat16, in C (`native/linear.c`), which fetches the next weights while it multiplies these.

    weight: [out, in], numbers or stored blocks; few rows are multiplied with the blocks themselves, if there are any
    (`native/linear_blocks.c`), which takes less time and gives the same bits.
    gated: the first half of the outputs are gates, and the result is silu(gate) * other half, [T, out / 2].
    """

    def __init__(self, weight: Tensor | StoredBlocks, bias: Tensor | None, native: Native, gated: bool = False) -> None:
        self.out_features: int = weight.shape[0]
        self._native = native
        self._out: int = weight.shape[0]
        self._in: int = weight.shape[1]
        self._gated = gated
        self._bias = None if bias is None else bias.contiguous()
        self._packed = torch.empty(native.linear_elements(self._out, self._in), dtype=torch.bfloat16)
        self._blocks: Tensor | None = None
        self._form = 0
        if isinstance(weight, StoredBlocks):
            self._form = _FORMS[weight.form.name]
            self._blocks = self._pack_blocks(np.ascontiguousarray(weight.data))
        else:
            weight = weight.contiguous()
            native.linear_pack(weight.data_ptr(), self._packed.data_ptr(), self._out, self._in, gated)
        blocks = 0 if self._blocks is None else self._blocks.nbytes
        self.weight_bytes = 2 * self._out * self._in + blocks + (0 if bias is None else bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        if self._gated:
            return self._multiply(x, x.new_empty((x.shape[0], self._out // 2)), _GATED)
        return self._multiply(x, x.new_empty((x.shape[0], self._out)), _BF16)

    def wide(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.new_empty((x.shape[0], self._out), dtype=torch.float32), _FLOAT)

    def into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(self(x))

    def _pack_blocks(self, data: npt.NDArray[np.uint8]) -> Tensor:
        """Fills both forms from stored rows; returns the blocks."""
        native, sizes = self._native, (self._out, self._in, self._form)
        blocks = torch.empty(native.blocks_bytes(*sizes), dtype=torch.uint8)
        native.blocks_pack(data.ctypes.data, blocks.data_ptr(), *sizes, self._gated)
        native.blocks_unpack(blocks.data_ptr(), self._packed.data_ptr(), *sizes)
        return blocks

    def _multiply(self, x: Tensor, y: Tensor, out: int) -> Tensor:
        native, rows = self._native, x.shape[0]
        bias = None if self._bias is None else self._bias.data_ptr()
        rest = (bias, y.data_ptr(), rows, self._out, self._in, out)
        if self._blocks is not None and rows <= native.blocks_rows:
            native.blocks_linear(x.data_ptr(), x.stride(0), self._blocks.data_ptr(), self._form, *rest)
        else:
            native.linear(x.data_ptr(), x.stride(0), self._packed.data_ptr(), *rest)
        return y


class BlocksLinear:
    """bfloat16, where oneDNN has matrix tiles (AMX): few rows with the stored blocks, in C, more through oneDNN.

    A step of few rows takes the time to read its weights, and the blocks are a quarter of them. The two add up in
    another order, so near ties may fall differently as the number of rows changes.
    """

    def __init__(self, weight: StoredBlocks, bias: Tensor | None, native: Native) -> None:
        self._native = native
        self.out_features, self._in = weight.shape
        self._form = _FORMS[weight.form.name]
        self._bias = None if bias is None else bias.contiguous()
        self._many = OneDnnLinear(dequantize(weight.data, weight.form, torch.bfloat16), self._bias)
        sizes = (self.out_features, self._in, self._form)
        self._blocks = torch.empty(native.blocks_bytes(*sizes), dtype=torch.uint8)
        data = np.ascontiguousarray(weight.data)
        native.blocks_pack(data.ctypes.data, self._blocks.data_ptr(), *sizes, False)
        self.weight_bytes = self._many.weight_bytes + self._blocks.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[0] > self._native.blocks_rows:
            return self._many(x)
        return self._few(x, x.new_empty((x.shape[0], self.out_features)), _BF16)

    def wide(self, x: Tensor) -> Tensor:
        if x.shape[0] > self._native.blocks_rows:
            return self._many.wide(x)
        return self._few(x, x.new_empty((x.shape[0], self.out_features), dtype=torch.float32), _FLOAT)

    def into(self, x: Tensor, out: Tensor) -> None:
        out.copy_(self(x))

    def _few(self, x: Tensor, y: Tensor, out: int) -> Tensor:
        bias = None if self._bias is None else self._bias.data_ptr()
        rest = (bias, y.data_ptr(), x.shape[0], self.out_features, self._in, out)
        self._native.blocks_linear(x.data_ptr(), x.stride(0), self._blocks.data_ptr(), self._form, *rest)
        return y


def make_linear(weight: Tensor | StoredBlocks, bias: Tensor | None, placement: Placement) -> Linear:
    """weight: [out, in]; blocks only such as come from `usable_blocks`."""
    if isinstance(weight, StoredBlocks):
        if placement.native is None:
            raise ValueError("stored blocks need the C kernels")
        if placement.linears == "native":
            return NativeLinear(weight, bias, placement.native)
        return BlocksLinear(weight, bias, placement.native)
    kind = placement.linears
    if kind == "few-row" and placement.few is not None:
        return FewRowLinear(weight, bias, placement.device, placement.few)
    if kind == "native" and placement.native is not None and placement.native.linear_elements(*weight.shape):
        return NativeLinear(weight, bias, placement.native)
    if kind == "oneDNN":
        return OneDnnLinear(weight, bias)
    return TorchLinear(weight, bias, placement)


def make_gated(weight: Tensor | StoredBlocks, bias: Tensor | None, placement: Placement) -> NativeLinear | None:
    """Both projections of a gated MLP and its activation in one product; None where there is no such product."""
    if placement.linears != "native" or placement.native is None or not placement.native.linear_elements(*weight.shape):
        return None
    return NativeLinear(weight, bias, placement.native, gated=True)


def _bytes(weight: Tensor, bias: Tensor | None) -> int:
    return weight.nbytes + (0 if bias is None else bias.nbytes)
