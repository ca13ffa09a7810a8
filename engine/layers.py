"""The layers a decoder is built from. Tensor parallelism lives here: each layer reads and holds its rank's share."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .comm import Communicator
from .comm_symm import SymmetricComm
from .config import ModelConfig, RopeScaling
from .sharding import Span
from .weights import WeightSource

# oneDNN lays weights out for this many rows; measured, the same layout is as good as any from 1 row to 1,024.
_PACK_ROWS = 32
FIRST_ROPE_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how weights live. pack: lay linear weights out for oneDNN where that is supported."""

    device: torch.device
    dtype: torch.dtype
    pack: bool = True

    @property
    def packs(self) -> bool:
        if not self.pack or self.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
            return False
        if not torch.backends.mkldnn.is_available():
            return False
        if self.dtype is torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return self.dtype is torch.float32


class Linear:
    """y = x W^T + b; W: [out, in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, placement: Placement) -> None:
        self.weight_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self.out_features = weight.shape[0]
        self._bias = None if bias is None else bias.to(placement.device)
        self._packed = placement.packs
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS)
        else:
            self._weight = weight.to(placement.device)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def into(self, x: Tensor, out: Tensor) -> None:
        """The same into `out`, without another copy where there is no bias and no packing."""
        if self._packed or self._bias is not None:
            out.copy_(self(x))
        else:
            torch.mm(x, self._weight.t(), out=out)


class RowParallelLinear:
    """Each rank multiplies its columns of W with its part of x; the sum over the ranks is the result."""

    def __init__(self, linear: Linear, comm: Communicator) -> None:
        self._linear = linear
        self._comm = comm
        self._symmetric = comm if isinstance(comm, SymmetricComm) else None
        self.weight_bytes = linear.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        if self._symmetric is not None:
            staged = self._symmetric.staging((x.shape[0], self._linear.out_features), x.dtype)
            if staged is not None:  # computed where the peers read it
                self._linear.into(x, staged)
                return self._symmetric.all_reduce(staged)
        return self._comm.all_reduce(self._linear(x))


def column_parallel(
    source: WeightSource, parts: Sequence[tuple[str, Span]], bias: bool, placement: Placement
) -> Linear:
    """One product for several projections: the given rows of each named one, below each other."""
    weights = [source.read(f"{name}.weight", placement.dtype, 0, rows.start, rows.stop) for name, rows in parts]
    biases = [source.read(f"{name}.bias", placement.dtype, 0, rows.start, rows.stop) for name, rows in parts if bias]
    return Linear(torch.cat(weights), torch.cat(biases) if bias else None, placement)


def row_parallel(
    source: WeightSource, name: str, columns: Span, bias: bool, comm: Communicator, placement: Placement
) -> RowParallelLinear:
    """The given columns of the named projection; its bias is added by rank 0 alone."""
    weight = source.read(f"{name}.weight", placement.dtype, 1, columns.start, columns.stop)
    own_bias = source.read(f"{name}.bias", placement.dtype) if bias and comm.rank == 0 else None
    return RowParallelLinear(Linear(weight, own_bias, placement), comm)


class VocabParallelEmbedding:
    """Each rank holds the rows of its token ids, gives zeros for the others, and the ranks add up."""

    def __init__(self, weight: Tensor, span: Span, comm: Communicator) -> None:
        self._weight = weight
        self._span = span
        self._comm = comm
        self.weight_bytes = weight.nbytes

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self._comm.world_size == 1:
            return F.embedding(token_ids, self._weight)
        local = token_ids - self._span.start
        foreign = (local < 0) | (local >= self._span.size)
        vectors = F.embedding(local.masked_fill_(foreign, 0), self._weight)
        return self._comm.all_reduce(vectors.masked_fill_(foreign.unsqueeze(-1), 0))


class RotaryTable:
    """Cosines and sines of every position's angles, float32 [positions, head_dim / 2], made as far as needed.

    length: positions to begin with; nothing is made later where no more are ever asked for.
    """

    def __init__(self, config: ModelConfig, device: torch.device, length: int = FIRST_ROPE_LENGTH) -> None:
        self._frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self._limit = config.max_position
        self._device = device
        self._table = self._build(min(length, self._limit))

    def upto(self, length: int) -> tuple[Tensor, Tensor]:
        """Tables that cover positions below `length`, and perhaps more."""
        if length > self._table[0].shape[0]:
            self._table = self._build(max(length, min(2 * length, self._limit)))
        return self._table

    def _build(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(length, dtype=torch.float32), self._frequencies)
        return angles.cos().to(self._device), angles.sin().to(self._device)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair, float32 [head_dim / 2], as in Su et al. 2021 and Llama 3.1's reference code."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Waves longer than the trained context are stretched, short ones kept, those between blended.
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies
