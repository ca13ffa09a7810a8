"""Weights from a GGUF file: renamed, un-permuted and dequantised, only the slice that is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.config import ModelConfig
from treadle.engine.gguf import GGUFFile, TensorInfo
from treadle.errors import CorruptWeights

from .dequantize import dequantize
from .source import Shape, StoredBlocks, check_shape, check_slice, expected_shapes

_SAMPLE_BYTES = 256
_SAMPLES = 64
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFSource:
    """A `WeightSource`. Raises CorruptWeights at once when a tensor is missing or has another shape."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = GGUFFile(path)
        self._config = config
        self._tensors: dict[str, TensorInfo] = {}
        for name, shape in expected_shapes(config).items():
            stored = _stored_name(name)
            tensor = self._file.tensors.get(stored)
            if tensor is None:
                raise CorruptWeights(f"{path}: the tensor {stored} ({name}) is missing, expected {list(shape)}")
            check_shape(path, f"{stored} ({name})", tensor.shape, shape)
            self._tensors[name] = tensor

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def read(
        self, name: str, dtype: torch.dtype, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        tensor = self._tensor(name)
        stop = check_slice(name, tensor.shape, dim, start, stop)
        data, unit = self._file.data(tensor), self._unit(name)
        if len(tensor.shape) == 1:
            column = data.reshape(-1, tensor.type.size)
            if tensor.type.block != 1:
                return dequantize(data, tensor.type, dtype)[0, start:stop].clone()
            return _read_rows(column, tensor, dtype, unit, start, stop).reshape(-1)
        if dim == 0:
            return _read_rows(data, tensor, dtype, unit, start, stop)
        block, size = tensor.type.block, tensor.type.size
        first, last = start // block, -(-stop // block)
        columns = _unpermute(data[:, first * size : last * size], unit)
        values = dequantize(columns, tensor.type, dtype)
        return values[:, start - first * block : stop - first * block].contiguous()

    def blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> StoredBlocks | None:
        tensor = self._tensor(name)
        stop = check_slice(name, tensor.shape, dim, start, stop)
        unit = self._unit(name)
        step = unit if dim == 0 else tensor.type.block
        if tensor.type.block == 1 or len(tensor.shape) == 1 or start % step or stop % step:
            return None
        data = self._file.data(tensor)
        if dim == 0:
            return StoredBlocks(_unpermute(data[start:stop], unit), tensor.type)
        columns = slice(start // step * tensor.type.size, stop // step * tensor.type.size)
        return StoredBlocks(_unpermute(data[:, columns], unit), tensor.type)

    def fingerprint(self) -> str:
        """Hash of the config, the header, the size of the file and bytes spread over it."""
        digest = hashlib.sha256(repr(self._config).encode())
        digest.update(self._file.header())
        digest.update(str(self._file.size).encode())
        for tensor in list(self._tensors.values())[:: max(len(self._tensors) // _SAMPLES, 1)]:
            data = self._file.data(tensor).reshape(-1)
            middle = len(data) // 2
            digest.update(data[middle : middle + _SAMPLE_BYTES].tobytes())
        return digest.hexdigest()

    def _tensor(self, name: str) -> TensorInfo:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CorruptWeights(f"{self._file.path}: there is no tensor {name}")
        return tensor

    def _unit(self, name: str) -> int:
        """Rows that were permuted among each other: "llama" files hold the two halves of q and k heads interleaved."""
        permuted = self._config.architecture == "llama" and (".q_proj." in name or ".k_proj." in name)
        return self._config.head_dim if permuted else 1


def _stored_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" to "blk.3.ffn_up.weight"."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_LAYER[rest]}.{kind}"


def _read_rows(
    data: npt.NDArray[np.uint8], tensor: TensorInfo, dtype: torch.dtype, unit: int, start: int, stop: int
) -> torch.Tensor:
    """Rows [start, stop) of `data` [rows, bytes]; whole units (heads) are read: the permutation stays inside one."""
    first, last = start // unit * unit, -(-stop // unit) * unit
    values = dequantize(_unpermute(data[first:last], unit), tensor.type, dtype)
    return values[start - first : stop - first].contiguous()


def _unpermute(data: npt.NDArray[np.uint8], unit: int) -> npt.NDArray[np.uint8]:
    """Rows (half, 2) of each unit back to (2, half): rotation pairs i, i + half instead of 2i, 2i + 1.

    Moves stored rows, which is cheaper than moving numbers, and possible because blocks never cross rows.
    """
    if unit == 1:
        return data
    rows, width = data.shape
    return data.reshape(rows // unit, unit // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
