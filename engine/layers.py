"""The layers a decoder is built from. Tensor parallelism lives here: each layer reads and holds its rank's share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .comm import Communicator
from .comm_side import SideSums
from .comm_symm import SymmetricComm
from .config import ModelConfig, RopeScaling
from .linear import Linear, Placement, make_gated, make_linear, usable_blocks
from .linear_few import FewRowLinear
from .norm import Hidden, Norm, Unnormed, normed
from .ops import Ops
from .sharding import Span
from .weights import StoredBlocks, WeightSource

FIRST_ROPE_LENGTH = 2048


class RowParallelLinear:
    """Each rank multiplies its columns of W with its part of x; the sum over the ranks is the result."""

    def __init__(self, linear: Linear, comm: Communicator, turn: int = 0) -> None:
        """turn: 0 and 1 for the two sums of a layer, see `comm_fused`."""
        self._linear = linear
        self._comm = comm
        self._symmetric = comm if isinstance(comm, SymmetricComm) else None
        self._fused = comm.fused
        self._turn = turn
        self._few = linear if isinstance(linear, FewRowLinear) and comm.world_size == 1 else None
        self.weight_bytes = linear.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        """The result of many rows may lie in `SymmetricComm.staging`: to be read before the next such product."""
        if self._symmetric is not None:
            staged = self._symmetric.staging((x.shape[0], self._linear.out_features), x.dtype)
            if staged is not None:  # computed where the peers read it
                self._linear.into(x, staged)
                return self._symmetric.reduce_staged(staged)
        return self._comm.all_reduce(self._linear(x))

    def add_norm(self, x: Tensor, residual: Tensor, norm: Norm) -> Hidden:
        """Adds the result to residual in place; returns the norm of that, or leaves it to the product that reads it."""
        if self._few is not None and self._few.few(x, add=True, out=residual) is not None:
            return Unnormed(residual, norm)
        if self._fused is not None:
            part = self._fused.slot(self._turn, (x.shape[0], self._linear.out_features), x.dtype)
            if part is not None:
                self._linear.into(x, part)
                return self._fused.add_norm(part, residual, norm.weight, norm.eps)
        # Perhaps in staging's memory. What reads it runs before the next row-parallel product of this stream writes
        # there, and the peers write there only while this stream takes part in a sum.
        return norm.of_sum(self(x), residual)

    def start(self, x: Tensor, sums: SideSums, half: int) -> Tensor:
        """Lets the sum begin; the result may be read once `sums` was waited for."""
        part = sums.part(half, (x.shape[0], self._linear.out_features), x.dtype)
        self._linear.into(x, part)
        sums.start(half, part)
        return part

    def leaves_norm(self, x: Tensor) -> bool:
        """Whether `add_norm` of so many rows leaves the norm to the product that follows."""
        return self._few is not None and self._few.takes(x)

    def warm(self, x: Tensor) -> None:
        """Has the kernels for so few rows compiled, if there are such."""
        if isinstance(self._linear, FewRowLinear):
            out = x.new_zeros((x.shape[0], self._linear.out_features))
            self._linear.few(x, add=self._few is not None, out=out)


class ColumnParallelLinear:
    """Each rank has all of x and its own rows of W."""

    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.weight_bytes = linear.weight_bytes

    def __call__(self, x: Hidden) -> Tensor:
        return self._linear(x) if isinstance(self._linear, FewRowLinear) else self._linear(normed(x))

    def warm(self, x: Hidden) -> None:
        """See `RowParallelLinear.warm`."""
        if isinstance(self._linear, FewRowLinear):
            self._linear.few(x)


def column_parallel(
    source: WeightSource, parts: Sequence[tuple[str, Span]], bias: bool, placement: Placement
) -> ColumnParallelLinear:
    """One product for several projections: the given rows of each named one, below each other."""
    return ColumnParallelLinear(make_linear(*_stacked(source, parts, bias, placement), placement))


class GatedLinear:
    """silu(x W_gate^T + b_gate) * (x W_up^T + b_up) of this rank's columns (Shazeer 2020), [T, size of `columns`]."""

    def __init__(
        self, source: WeightSource, prefix: str, columns: Span, bias: bool, placement: Placement, ops: Ops
    ) -> None:
        parts = ((f"{prefix}.gate_proj", columns), (f"{prefix}.up_proj", columns))
        weight, biases = _stacked(source, parts, bias, placement)
        self._fused = make_gated(weight, biases, placement)
        self._both = self._fused or make_linear(weight, biases, placement)
        self._few = self._both if isinstance(self._both, FewRowLinear) else None
        self._ops = ops
        self.weight_bytes = self._both.weight_bytes

    def __call__(self, x: Hidden) -> Tensor:
        y = None if self._few is None else self._few.few(x, gated=True)
        if y is not None:
            return y
        return self._both(normed(x)) if self._fused else self._ops.silu_mul(self._both(normed(x)))

    def warm(self, x: Hidden) -> None:
        """See `RowParallelLinear.warm`."""
        if self._few is not None:
            self._few.few(x, gated=True)


def row_parallel(
    source: WeightSource, name: str, columns: Span, bias: bool, comm: Communicator, placement: Placement, turn: int
) -> RowParallelLinear:
    """The given columns of the named projection; its bias is added by rank 0 alone. turn: see `RowParallelLinear`."""
    own_bias = source.read(f"{name}.bias", placement.dtype) if bias and comm.rank == 0 else None
    stored = source.blocks(f"{name}.weight", 1, columns.start, columns.stop)
    weight: Tensor | StoredBlocks | None = usable_blocks([stored], placement)
    if weight is None:
        weight = source.read(f"{name}.weight", placement.dtype, 1, columns.start, columns.stop)
    return RowParallelLinear(make_linear(weight, own_bias, placement), comm, turn)


def _stacked(
    source: WeightSource, parts: Sequence[tuple[str, Span]], bias: bool, placement: Placement
) -> tuple[Tensor | StoredBlocks, Tensor | None]:
    dtype = placement.dtype
    biases = [source.read(f"{name}.bias", dtype, 0, rows.start, rows.stop) for name, rows in parts if bias]
    stacked_bias = torch.cat(biases) if bias else None
    stored = [source.blocks(f"{name}.weight", 0, rows.start, rows.stop) for name, rows in parts]
    blocks = usable_blocks(stored, placement)
    if blocks is not None:
        return blocks, stacked_bias
    weights = [source.read(f"{name}.weight", dtype, 0, rows.start, rows.stop) for name, rows in parts]
    return torch.cat(weights), stacked_bias


def vocabulary_head(source: WeightSource, name: str, rows: Span, table: Tensor | None, placement: Placement) -> Linear:
    """The product that gives the logits of the token ids `rows`. table: its weights where they were read already."""
    blocks = usable_blocks([source.blocks(name, 0, rows.start, rows.stop)], placement)
    if blocks is not None:
        return make_linear(blocks, None, placement)
    if table is None:
        table = source.read(name, placement.dtype, 0, rows.start, rows.stop)
    return make_linear(table, None, placement)


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
