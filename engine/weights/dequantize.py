"""Stored GGUF blocks to numbers.

The common block formats are unpacked here, a cache-sized piece at a time; the rest go through `gguf.quants`, which also
defines what is right: results are equal to its bit for bit (float32 arithmetic, then one rounding to the wanted dtype).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.gguf import TensorType

# Elements unpacked at a time: the float32 intermediate of one piece stays in the second-level cache.
_PIECE = 1 << 16

# From bytes [blocks, bytes per block] to float32 [blocks, elements per block].
_Unpack = Callable[[torch.Tensor, torch.Tensor], None]


def dequantize(data: npt.NDArray[np.uint8], form: TensorType, dtype: torch.dtype) -> torch.Tensor:
    """data: [rows, bytes per row], whole blocks. Returns [rows, elements per row] in `dtype`."""
    rows, width = data.shape[0], data.shape[1] // form.size * form.block
    if data.size == 0:
        return torch.empty((rows, width), dtype=dtype)
    plain = _PLAIN.get(form.name)
    if plain is not None:
        return torch.from_numpy(np.array(data)).view(plain).to(dtype)
    unpack = _UNPACK.get(form.name)
    out = torch.empty((rows * width // form.block, form.block), dtype=dtype)
    blocks = data.reshape(-1, form.size)
    step = max(_PIECE // form.block, 1)
    scratch = torch.empty((min(step, len(out)), form.block), dtype=torch.float32)
    for start in range(0, len(out), step):
        piece = np.ascontiguousarray(blocks[start : start + step])
        if unpack is None:
            out[start : start + step] = torch.from_numpy(_by_gguf(piece, form))
        else:
            values = scratch[: len(piece)]
            unpack(torch.from_numpy(piece if piece.flags.writeable else piece.copy()), values)
            out[start : start + step] = values
    return out.view(rows, width)


def _by_gguf(piece: npt.NDArray[np.uint8], form: TensorType) -> npt.NDArray[np.float32]:
    # Imported here: most models need none of it, and it costs a tenth of a second.
    import gguf

    values: npt.NDArray[np.float32] = gguf.dequantize(piece, gguf.GGMLQuantizationType[form.name])
    return values


def _half(blocks: torch.Tensor, offset: int) -> torch.Tensor:
    """The float16 at `offset` of every block, as float32 [blocks, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor, out: torch.Tensor) -> None:
    """16 bytes to 32 numbers: the low halves first, then the high ones."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(blocks[:, 2:].view(torch.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_UNPACK: dict[str, _Unpack] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
