"""Weights made up for benchmarks: any shape quickly, and the same numbers however they are sliced."""

from __future__ import annotations

import hashlib

import torch

from treadle.engine.config import ModelConfig
from treadle.errors import CorruptWeights

from .source import Shape, check_slice, expected_shapes

STD = 0.02
_TABLE = 1 << 20
# Odd, so that multiples are distinct modulo the table's size; near the golden ratio, so that they spread.
_STRIDE = 648055


class RandomSource:
    """A `WeightSource` whose rows are windows into one table of normal numbers (mean 0, std 0.02).

    Where a row begins depends on the seed, the name and the row alone, so ranks that read different slices agree, and a
    row costs one copy. No two of the first 2**20 rows of a tensor are equal. Norms are 1 and biases 0.
    The table is drawn on the CPU and then lies on `device`, where the rows are made: the same numbers on every device,
    and on a GPU 16 GB of them in a fraction of a second.
    """

    def __init__(self, config: ModelConfig, seed: int, device: torch.device | None = None) -> None:
        self._config = config
        self._seed = seed
        self._shapes = expected_shapes(config)
        widest = max(shape[-1] for shape in self._shapes.values())
        generator = torch.Generator().manual_seed(seed & (1 << 63) - 1)
        self._device = device or torch.device("cpu")
        table = torch.randn(_TABLE, generator=generator).mul_(STD).to(self._device)
        self._table = table.repeat(2 + widest // _TABLE)
        self._cast: dict[torch.dtype, torch.Tensor] = {}

    def has(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> Shape:
        shape = self._shapes.get(name)
        if shape is None:
            raise CorruptWeights(f"random weights: there is no tensor {name}")
        return shape

    def read(
        self, name: str, dtype: torch.dtype, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        shape = self.shape(name)
        stop = check_slice(name, shape, dim, start, stop)
        if len(shape) == 1:
            return torch.full((stop - start,), 1.0 if "norm" in name else 0.0, dtype=dtype, device=self._device)
        lowest, highest = (start, stop) if dim == 0 else (0, shape[0])
        rows = torch.arange(lowest, highest, device=self._device)
        first, last = (0, shape[1]) if dim == 0 else (start, stop)
        offsets = (rows * _STRIDE + self._base(name)) % _TABLE + first
        table = self._cast.setdefault(dtype, self._table.to(dtype))
        windows = table.unfold(0, max(last - first, 1), 1)
        return windows.index_select(0, offsets)[:, : last - first].contiguous()

    def blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(f"random {self._seed} {self._config!r}".encode()).hexdigest()

    def _base(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % _TABLE
