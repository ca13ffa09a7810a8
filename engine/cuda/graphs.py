"""Decode steps as CUDA graphs: one launch where there were hundreds.

Two graphs for each size of a ladder: from the packet to the logits, and from the logits to tokens. The second follows
prefill steps too, and is left out where a row needs more than the fused sampler does. All share one memory pool, since
they run one after the other; the largest is captured first, so the pool does not grow after it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch

from .program import StepProgram

_FINE = ((8, 64), (16, 256), (32, 512), (64, 1 << 30))


def ladder(most: int) -> list[int]:
    """1, 2, 4, then in steps that grow, up to `most`, which is always one of them.

    Few, as each is captured at the start; a step is padded by a fifth at most, from 64 rows on.
    """
    sizes = [size for size in (1, 2, 4) if size < most]
    size = 8
    while size < most:
        sizes.append(size)
        size += next(step for step, limit in _FINE if size < limit)
    return [*sizes, most]


class Graphs:
    """Runs the program, from graphs once `capture` was called and directly before."""

    def __init__(self, program: StepProgram, max_rows: int) -> None:
        self.sizes = ladder(max_rows)
        self._program = program
        self._decode: dict[int, torch.cuda.CUDAGraph] = {}
        self._sample: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def size_for(self, rows: int) -> int:
        return self.sizes[bisect_left(self.sizes, rows)]

    def decode(self, size: int, max_context: int) -> None:
        graph = self._decode.get(size)
        if graph is not None:
            graph.replay()
        else:
            self._program.decode(size, max_context)

    def sample(self, size: int, filtered: bool) -> None:
        graph = self._sample.get((size, filtered))
        if graph is not None:
            graph.replay()
        else:
            self._program.sample(size, filtered)

    def capture(self, max_context: int) -> None:
        """max_context: the longest that any row may ever be; the graphs serve all lengths up to it."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self.sizes):
            self._decode[size] = _record(partial(self._program.decode, size, max_context), pool)
            if self._program.fused is None:
                continue
            for filtered in (True, False):
                self._sample[size, filtered] = _record(partial(self._program.sample, size, filtered), pool)


def _record(work: Callable[[], None], pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """Captures `work` on the current stream, which must not be the default one.

    It runs once before: kernels are compiled and loaded, workspaces and communicators made, none of which a capture
    allows. Not through `torch.cuda.graph`, which empties the allocator's cache for every graph. The error mode is
    thread-local because NCCL's watchdog asks for events on a thread of its own.
    """
    work()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        work()
    finally:
        graph.capture_end()
    return graph
