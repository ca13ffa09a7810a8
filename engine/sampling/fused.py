"""Sampling on the device in a fixed sequence of launches, for CUDA graphs: the same tokens as `sampler.Sampler`.

What is launched depends on shapes and on one host flag. Rows' parameters are read on the device: a row without filters
passes through the launches of the filters at once. The kernels say how it is done: `kernels.sampling` the draw,
`kernels.sampling_filters` the cut of top-k, top-p and min-p. Ranks exchange, for each row:

| | exchanges | each rank sends |
|---|---|---|
| always | 1 | a score and a token id |
| where filters may be in use | 10 more | two bounds; 8 times a histogram of 256 counts and masses; a count |

A fixed number of small exchanges, however flat the distribution: a captured graph cannot come back for more.
Slices of the vocabulary must follow the order of the ranks.
"""

from __future__ import annotations

import torch

from treadle.engine.comm import Communicator
from treadle.engine.kernels import sampling as draw
from treadle.engine.kernels import sampling_filters as search

from .device_params import WORDS, DeviceParams, pack_params

__all__ = ["WORDS", "DeviceParams", "FusedWorkspace", "pack_params", "sample_fused"]

TILE = 1024
_GROUP = 128
_PROGRAMS = 2048
"""About as many as fill a GPU; fewer of them with more tiles each cost less to start."""
_SEARCHES = 2 * search.ROUNDS
_HISTOGRAM = 2 * (search.BINS + 1)


class FusedWorkspace:
    """Scratch of the fused sampler, allocated once; one step at a time.

    max_samples: the most rows of a call. filtered: whether it will be called with `filtered`. tile: a power of two, the
    tokens a kernel takes at once (smaller in tests).
    """

    def __init__(
        self,
        max_samples: int,
        vocab_local: int,
        device: torch.device | str,
        filtered: bool = True,
        tile: int = TILE,
    ) -> None:
        self.max_samples = max_samples
        self.vocab_local = vocab_local
        self.tile = tile
        self.tiles = -(-vocab_local // tile)
        self.groups = max(1, tile // _GROUP)
        self.device = torch.device(device)
        self.filtered = filtered
        self._bounds = torch.empty(max_samples * self.tiles, dtype=torch.float32, device=device)
        self._pairs = torch.empty((max_samples, 2), dtype=torch.float64, device=device)
        rows = max_samples if filtered else 0
        self.maxima = torch.empty((rows, self.tiles * self.groups), dtype=torch.float32, device=device)
        self.tile_ties = torch.empty(rows * self.tiles, dtype=torch.int32, device=device)
        self._small = torch.empty((rows, 2), dtype=torch.float64, device=device)
        self._info = torch.empty((rows, search.INFO_WORDS), dtype=torch.int64, device=device)
        self._cuts = torch.empty((rows, 2), dtype=torch.int64, device=device)
        self._states = torch.empty((_SEARCHES + 1, rows, search.STATE_WORDS), dtype=torch.int64, device=device)
        self._counters = torch.empty(rows * (_SEARCHES * _HISTOGRAM + 1), dtype=torch.int64, device=device)


def sample_fused(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: DeviceParams,
    positions: torch.Tensor,
    comm: Communicator,
    vocab_start: int,
    workspace: FusedWorkspace,
    filtered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens int64 [S] (0 where the row is at fault) and peaks float64 [S] (not finite where it is at fault).

    logits: float32, bfloat16 or float16 [S, vocab_local], last dimension contiguous, not changed.
    rows: int32 [S], of each sample, into `params.storage`. positions: int64 [S], of the token to be drawn (the input
    token's position + 1). filtered: whether any row may have FILTERED set; a host flag, since it decides what is
    launched. Nothing waits for the device; penalties, bias, lists and log-probabilities are not looked at.
    """
    return _Call(logits, rows, params, positions, comm, vocab_start, workspace).run(filtered)


class _Call:
    """One call's arguments, in the order in which the kernels take them."""

    def __init__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        params: DeviceParams,
        positions: torch.Tensor,
        comm: Communicator,
        vocab_start: int,
        workspace: FusedWorkspace,
    ) -> None:
        self._samples = len(logits)
        if logits.shape[1] != workspace.vocab_local or self._samples > workspace.max_samples:
            raise ValueError(f"a workspace for {workspace.max_samples} x {workspace.vocab_local}: {logits.shape}")
        if logits.stride(1) != 1:
            raise ValueError("logits must be contiguous in the vocabulary")
        self._logits = logits
        self._stride = logits.stride(0)
        self._rows = rows
        self._params = params.storage
        self._vocab_size = params.vocab_size
        self._positions = positions
        self._comm = comm
        self._start = vocab_start
        self._space = workspace
        tiles = workspace.tiles
        self._per_program = max(1, min(8, self._samples * tiles // _PROGRAMS))
        self._grid = (self._samples, max(1, -(-tiles // self._per_program)))
        self._tiles_power = _power_of_two(tiles)

    def run(self, filtered: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.empty(self._samples, dtype=torch.int64, device=self._logits.device)
        peaks = torch.empty(self._samples, dtype=torch.float64, device=self._logits.device)
        if not self._samples:
            return tokens, peaks
        if filtered and not self._space.filtered:
            raise ValueError("this workspace is for rows without filters")
        if filtered:
            self._find_cuts()
        self._draw(filtered, tokens, peaks)
        return tokens, peaks

    def _draw(self, use_cuts: bool, tokens: torch.Tensor, peaks: torch.Tensor) -> None:
        space, single = self._space, self._comm.world_size == 1
        pairs = space._pairs[: self._samples]
        rows = (self._logits, self._stride, self._rows, self._params, self._positions, space._cuts)
        size = (space.vocab_local, self._start, space.tiles)
        draw.bound_tiles[self._grid](
            *rows, space.maxima, space.maxima.stride(0), space._bounds, *size, self._per_program,
            TILE=space.tile, GROUPS=space.groups, WORDS=WORDS, USE_CUTS=use_cuts,
        )  # fmt: skip
        draw.pick_best[(self._samples,)](
            *rows, space._bounds, pairs, tokens, peaks, *size,
            TILE=space.tile, TILES=self._tiles_power, WORDS=WORDS, USE_CUTS=use_cuts, FINAL=single,
        )  # fmt: skip
        if not single:
            every = self._comm.all_gather(pairs)
            draw.agree[(self._samples,)](every, tokens, peaks, self._samples, WORLD=self._comm.world_size, num_warps=1)

    def _find_cuts(self) -> None:
        space, samples, world = self._space, self._samples, self._comm.world_size
        counters = space._counters[: samples * (_SEARCHES * _HISTOGRAM + 1)].zero_()
        # Histograms first: 16 divides their size, and kernels are compiled anew for addresses that it does not divide.
        histograms = counters[:-samples].view(_SEARCHES, samples, _HISTOGRAM)
        rank_ties, states = counters[-samples:], space._states
        shape = {"TILE": space.tile, "GROUPS": space.groups, "WORDS": WORDS}
        self._first_windows(shape)
        rows = (self._logits, self._stride, self._rows, self._params, space.maxima, space.maxima.stride(0), space._info)
        size = (samples, self._vocab_size, space.vocab_local, space.tiles, self._per_program)
        every = histograms[0]
        for turn in range(_SEARCHES):
            search.search_round[self._grid](
                *rows, states[max(turn - 1, 0)], every, states[turn], histograms[turn], *size,
                int(turn == 1), int(turn == search.ROUNDS), BEGIN=turn == 0, WORLD=world, **shape,
            )  # fmt: skip
            every = self._comm.all_gather(histograms[turn])
        search.count_ties[self._grid](
            *rows, states[_SEARCHES - 1], every, states[_SEARCHES], space.tile_ties, rank_ties, *size,
            WORLD=world, **shape,
        )  # fmt: skip
        search.place_cuts[(samples,)](
            self._logits, self._stride, self._rows, self._params, space._info, states[_SEARCHES], space.tile_ties,
            self._comm.all_gather(rank_ties), space._cuts, samples, space.vocab_local, self._start, space.tiles,
            self._comm.rank, TILE=space.tile, TILES=self._tiles_power, WORDS=WORDS,
        )  # fmt: skip

    def _first_windows(self, shape: dict[str, int]) -> None:
        space, samples = self._space, self._samples
        search.group_maxima[self._grid](
            self._logits, self._stride, self._rows, self._params, space.maxima, space.maxima.stride(0),
            space.vocab_local, space.tiles, self._per_program, **shape,
        )  # fmt: skip
        count = space.maxima.shape[1]
        search.row_peaks[(samples,)](
            self._rows, self._params, space.maxima, space.maxima.stride(0), count, space._small, self._vocab_size,
            ALL_GROUPS=_power_of_two(count), WORDS=WORDS,
        )  # fmt: skip
        search.first_windows[(samples,)](
            self._rows, self._params, self._comm.all_gather(space._small[:samples]), space._info, space._states[0],
            samples, self._vocab_size, WORDS=WORDS, WORLD=self._comm.world_size, num_warps=1,
        )  # fmt: skip


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
