"""Which products of few rows our kernels take, and with which tiles: the choice per shape, in one place.

`scripts/bench_linears.py` prints lines for `_MEASURED`: a shape, then for each number of rows the fastest tile, or None
where cuBLAS with the small kernels around it is as fast. Shapes that nobody measured get the general tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .shapes import LINES_AHEAD

MOST_ROWS = 32
_OLDEST = (8, 0)


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How a product is compiled. rows: of x in a program, 1 for the kernel without tensor cores.

    columns, depth: outputs of a program, and how much of the inner dimension an iteration takes. stages: iterations
    whose loads are on their way. pdl: launched while the kernel before still runs; ahead: lines of 128 bytes that it
    fetches of each of its first rows of weights meanwhile.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    pdl: bool = False
    ahead: int = 0


Ladder = tuple[tuple[int, LinearConfig | None], ...]
"""Up to so many rows, this."""

# (outputs, inner dimension, gated), on Hopper.
_MEASURED: Mapping[tuple[int, int, bool], Ladder] = {}

_FEW_OUTPUTS = 2048
_GENERAL: Ladder = (
    (1, LinearConfig(1, 8, 512, 4, 4)),
    (8, LinearConfig(8, 16, 256, 1, 4)),
    (16, LinearConfig(16, 32, 128, 2, 6)),
)
_NARROW: Ladder = (
    (1, LinearConfig(1, 4, 512, 2, 5)),
    (8, LinearConfig(8, 16, 256, 1, 7)),
    (16, LinearConfig(16, 16, 128, 1, 6)),
)


def choose(capability: tuple[int, int], rows: int, outputs: int, inner: int, gated: bool) -> LinearConfig | None:
    """For x [rows, inner] and so many outputs of each row; None: leave it to cuBLAS. capability: the GPU's."""
    if capability < _OLDEST or rows > MOST_ROWS:
        return None
    ladder = _MEASURED.get((outputs, inner, gated)) if capability[0] == 9 else None
    if ladder is None:
        ladder = _NARROW if outputs < _FEW_OUTPUTS else _GENERAL
    config = next((config for limit, config in ladder if rows <= limit), None)
    if config is None or LINES_AHEAD == 0 or capability < (9, 0):
        return config
    return replace(config, pdl=True, ahead=LINES_AHEAD)
