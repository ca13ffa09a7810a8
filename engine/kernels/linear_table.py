"""Which products of few rows our kernels take, and with which tiles: the choice per shape, in one place.

`scripts/bench_linears.py` prints lines for `_MEASURED`: a shape, then for each number of rows the fastest tile, or None
where cuBLAS with the small kernels around it is as fast. Numbers of rows with nearly equal tiles share one, so that
less is compiled. What counts is the sum over a layer: a product that leaves its norm to the next one needs the next one
to take it, so the shapes of a model end at the same number of rows. Shapes that nobody measured get the general tiles,
as far as those won for every shape that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MOST_ROWS = 32
_OLDEST = (8, 0)
_HOPPER = 9
# Major numbers of the GPUs whose multiprocessors have 227 KB of shared memory.
_LARGE = (9, 10)


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How a product is compiled. rows: of x in a program, 1 for the kernel without tensor cores.

    columns, depth: outputs of a program, and how much of the inner dimension an iteration takes. stages: iterations
    whose loads are on their way.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


Ladder = tuple[tuple[int, LinearConfig | None], ...]
"""Up to so many rows, this."""

# (outputs, inner dimension, gated), on an H100.
_MEASURED: Mapping[tuple[int, int, bool], Ladder] = {
    # Llama 3.1 8B: QKV, output projection, gate and up, down, head.
    (6144, 4096, False): (
        (1, LinearConfig(1, 4, 1024, 4, 3)),
        (8, LinearConfig(8, 32, 128, 2, 4)),
        (16, LinearConfig(16, 64, 256, 4, 3)),
        (32, LinearConfig(32, 64, 256, 4, 3)),
    ),
    (4096, 4096, False): (
        (1, LinearConfig(1, 4, 512, 2, 5)),
        (8, LinearConfig(8, 32, 256, 2, 4)),
        (16, LinearConfig(16, 64, 128, 4, 6)),
        (32, LinearConfig(32, 64, 128, 4, 6)),
    ),
    (14336, 4096, True): (
        (1, LinearConfig(1, 4, 1024, 4, 3)),
        (8, LinearConfig(8, 64, 256, 4, 3)),
        (16, LinearConfig(16, 64, 256, 4, 3)),
        (32, LinearConfig(32, 64, 64, 4, 6)),
    ),
    (4096, 14336, False): (
        (1, LinearConfig(1, 16, 256, 4, 7)),
        (8, LinearConfig(8, 16, 256, 2, 5)),
        (16, LinearConfig(16, 16, 256, 2, 5)),
        (32, LinearConfig(32, 64, 128, 4, 6)),
    ),
    (128256, 4096, False): (
        (1, LinearConfig(1, 8, 1024, 8, 3)),
        (8, LinearConfig(8, 16, 256, 1, 7)),
        (16, LinearConfig(16, 64, 128, 4, 6)),
        (32, LinearConfig(32, 128, 128, 4, 3)),
    ),
    # Qwen3 0.6B, likewise. Its layers are faster with cuBLAS from 17 rows on.
    (4096, 1024, False): (
        (1, LinearConfig(1, 2, 1024, 2, 4)),
        (8, LinearConfig(8, 32, 128, 2, 4)),
        (16, LinearConfig(16, 64, 256, 4, 3)),
    ),
    (1024, 2048, False): (
        (1, LinearConfig(1, 4, 512, 2, 5)),
        (8, LinearConfig(8, 16, 256, 1, 4)),
        (16, LinearConfig(16, 64, 128, 4, 6)),
    ),
    (3072, 1024, True): (
        (1, LinearConfig(1, 2, 1024, 2, 4)),
        (8, LinearConfig(8, 32, 128, 2, 4)),
        (16, LinearConfig(16, 32, 128, 2, 4)),
    ),
    (1024, 3072, False): (
        (1, LinearConfig(1, 8, 512, 4, 6)),
        (8, LinearConfig(8, 16, 512, 4, 4)),
        (16, LinearConfig(16, 16, 512, 4, 4)),
    ),
    (151936, 1024, False): (
        (1, LinearConfig(1, 2, 1024, 2, 4)),
        (8, LinearConfig(8, 16, 256, 1, 4)),
    ),
}

_GENERAL: Ladder = (
    (1, LinearConfig(1, 4, 512, 2, 5)),
    (8, LinearConfig(8, 32, 256, 2, 4)),
)
# As many outputs as give every multiprocessor of a Hopper a program of 64.
_MANY_OUTPUTS = 64 * 132
_WIDE_GATED: Ladder = (
    (1, LinearConfig(1, 4, 1024, 4, 3)),
    (8, LinearConfig(8, 64, 256, 4, 3)),
)
# Where there is less shared memory. Not measured.
_SMALL: Ladder = (
    (1, LinearConfig(1, 8, 512, 4, 4)),
    (8, LinearConfig(8, 16, 256, 1, 4)),
)


def choose(capability: tuple[int, int], rows: int, outputs: int, inner: int, gated: bool) -> LinearConfig | None:
    """For x [rows, inner] and so many outputs of each row; None: leave it to cuBLAS. capability: the GPU's."""
    if capability < _OLDEST or rows > MOST_ROWS:
        return None
    ladder = _ladder(capability, outputs, inner, gated)
    return next((config for limit, config in ladder if rows <= limit), None)


def row_kinds() -> tuple[int, ...]:
    """A number of rows for every entry of any ladder: with these, every tile of a shape is met."""
    ladders = (*_MEASURED.values(), _GENERAL, _WIDE_GATED, _SMALL)
    return tuple(sorted({limit for ladder in ladders for limit, _ in ladder}))


def _ladder(capability: tuple[int, int], outputs: int, inner: int, gated: bool) -> Ladder:
    if capability[0] not in _LARGE:
        return _SMALL
    if capability[0] == _HOPPER and (outputs, inner, gated) in _MEASURED:
        return _MEASURED[outputs, inner, gated]
    return _WIDE_GATED if gated and outputs >= _MANY_OUTPUTS else _GENERAL
