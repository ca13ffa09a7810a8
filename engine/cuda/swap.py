"""Blocks on their way between a GPU and host memory, beside the steps.

A block is scattered over layers, keys and values: 64 pieces of 32 KiB for an 8B model. So it is gathered into a staging
buffer on the device first, which takes microseconds and stands in the order of the steps, and goes from there in one
piece. Out: the gather is launched before the step that overwrites the block, the copy to the host runs beside that step
on a stream of its own. In: the copy to the staging buffer begins when the plan comes, which is while the step before it
still runs, on a third stream; the step waits for it and scatters. Nothing of it is in a CUDA graph.

Who waits for whom:
- a gather for the copy that last left its half of the staging buffer; a copy out for its gather;
- a copy in for the scatter that last used its half, and for copies out to the host blocks that it reads;
- a scatter for its copy in. A copy out to a host block that an earlier plan has read stands behind that plan's scatter
  in the order of the steps already.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from treadle.engine.kv import KVCache
from treadle.engine.sampling.upload import upload
from treadle.engine.swap import Pairs, checked_copies, flat_blocks
from treadle.transport.messages import StepPlan

STAGING_BYTES = 64 << 20
"""Of one of four buffers: two of each direction."""


def staging_blocks(block_bytes: int, host_blocks: int) -> int:
    """Blocks that one buffer holds."""
    return max(1, min(STAGING_BYTES // block_bytes, host_blocks))


class _Lane:
    """One direction: a stream, and two buffers in turn. On a CPU there are no streams, and all is in order."""

    def __init__(self, buffers: Tensor) -> None:
        self._cuda = buffers.device.type == "cuda"
        self._stream = torch.cuda.Stream(buffers.device) if self._cuda else None
        self._buffers = buffers
        self._free: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def take(self) -> tuple[int, Tensor, torch.cuda.Event | None]:
        """A buffer, its number, and what to wait for before it is written."""
        self._turn = 1 - self._turn
        return self._turn, self._buffers[self._turn], self._free[self._turn]

    def give_back(self, turn: int, after: torch.cuda.Event | None) -> None:
        self._free[turn] = after

    def beside(self) -> AbstractContextManager[object]:
        """What is launched within runs on the lane's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def mark(self) -> torch.cuda.Event | None:
        """An event on the stream that is current."""
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event


def _after(event: torch.cuda.Event | None) -> None:
    """What is launched on the current stream from now on waits for the event."""
    if event is not None:
        event.wait()


class StagedBlocks:
    """`BlockCopies` of a GPU, or of a CPU that does as if. host: [blocks, layers · 2, words], pinned.

    staging: bytes on the device, for four buffers of as many blocks as fit.
    """

    def __init__(self, kv: KVCache, blocks: int, staging: Tensor) -> None:
        device = kv.storage.device
        layers, two, total, *_ = kv.storage.shape
        self.blocks = blocks
        self._num_blocks = total
        self._pieces = layers * two
        self._flat = flat_blocks(kv.storage)
        words, dtype = self._flat.shape[1], self._flat.dtype
        self._offsets = torch.arange(self._pieces, device=device) * total
        lanes = staging.view(dtype).view(2, 2, -1, words)
        self._staging = lanes.shape[2] // self._pieces
        self._out, self._in = _Lane(lanes[0]), _Lane(lanes[1])
        pinned = device.type == "cuda"
        self.host = torch.empty((blocks, self._pieces, words), dtype=dtype, pin_memory=pinned)
        self._written: list[torch.cuda.Event | None] = [None] * blocks

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> None:
        out, back = checked_copies(plan, self._num_blocks, self.blocks)
        self.copy_out(out)
        self.copy_in(back)

    @torch.inference_mode()
    def copy_out(self, pairs: Pairs) -> None:
        lane = self._out
        for first in range(0, len(pairs), self._staging):
            part = pairs[first : first + self._staging]
            turn, buffer, free = lane.take()
            used = buffer[: len(part) * self._pieces]
            _after(free)
            torch.index_select(self._flat, 0, self._rows(part[:, 0]), out=used)
            gathered = lane.mark()
            with lane.beside():
                _after(gathered)
                staged = used.view(len(part), self._pieces, -1)
                for start, stop in runs(part[:, 1]):
                    place = int(part[start, 1])
                    self.host[place : place + stop - start].copy_(staged[start:stop], non_blocking=True)
                gone = lane.mark()
            lane.give_back(turn, gone)
            for place in part[:, 1].tolist():
                self._written[place] = gone

    @torch.inference_mode()
    def copy_in(self, pairs: Pairs) -> None:
        lane = self._in
        for first in range(0, len(pairs), self._staging):
            part = pairs[first : first + self._staging]
            turn, buffer, free = lane.take()
            used = buffer[: len(part) * self._pieces]
            with lane.beside():
                _after(free)
                for event in {self._written[place] for place in part[:, 0].tolist()}:
                    _after(event)
                staged = used.view(len(part), self._pieces, -1)
                for start, stop in runs(part[:, 0]):
                    place = int(part[start, 0])
                    staged[start:stop].copy_(self.host[place : place + stop - start], non_blocking=True)
                arrived = lane.mark()
            _after(arrived)
            self._flat.index_copy_(0, self._rows(part[:, 1]), used)
            lane.give_back(turn, lane.mark())

    def wait(self) -> None:
        if self._flat.device.type == "cuda":
            torch.cuda.current_stream(self._flat.device).synchronize()
        self._out.wait()
        self._in.wait()

    def _rows(self, blocks: np.ndarray) -> Tensor:
        """Where the pieces of the blocks lie, block by block."""
        numbers = upload(blocks.astype(np.int64), self._flat.device)
        return (numbers[:, None] + self._offsets).flatten()


def runs(places: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of stretches of places that follow each other: each is one copy."""
    breaks = (np.flatnonzero(np.diff(places) != 1) + 1).tolist()
    yield from zip([0, *breaks], [*breaks, len(places)], strict=True)
