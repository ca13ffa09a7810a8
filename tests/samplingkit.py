"""What the tests of sampling share: ranks as threads, and a one-call sampler over any cut of the vocabulary."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

from treadle.engine.comm import Communicator, SingleComm
from treadle.engine.sampling.local import TorchOps
from treadle.engine.sampling.masks import LocalMasks
from treadle.engine.sampling.sampler import SampleOutput, Sampler
from treadle.engine.sampling.state import SamplingState
from treadle.transport.codec import pack
from treadle.transport.messages import Masks, RowStart, SamplingParams, TokenLogprobs

T = TypeVar("T")


class ThreadComm:
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list[torch.Tensor | None]) -> None:
        self.rank = rank
        self.world_size = len(shared)
        self.gathers = 0
        self._barrier = barrier
        self._shared = shared

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.gathers += 1
        self._shared[self.rank] = x.clone()
        self._barrier.wait(30)
        out = torch.stack([part for part in self._shared if part is not None])
        self._barrier.wait(30)
        return out

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.all_gather(x).sum(0))

    def barrier(self) -> None:
        self._barrier.wait(30)


def on_ranks(cuts: Sequence[int], work: Callable[[Communicator, int, int], T]) -> list[T]:
    """work(comm, first token, number of tokens) on one thread for each slice between neighbouring cuts."""
    slices = [(low, high - low) for low, high in pairwise(cuts)]
    if len(slices) == 1:
        return [work(SingleComm(), *slices[0])]
    barrier = threading.Barrier(len(slices))
    shared: list[torch.Tensor | None] = [None] * len(slices)

    def one(rank: int) -> T:
        try:
            return work(ThreadComm(rank, barrier, shared), *slices[rank])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(slices)) as pool:
        return list(pool.map(one, range(len(slices))))


class Batch:
    """Rows with their parameters and known tokens; row numbers are places in the list."""

    def __init__(
        self,
        vocab: int,
        params: Sequence[SamplingParams],
        seeds: Sequence[int] | None = None,
        tokens: Sequence[Sequence[int]] | None = None,
        prompt_lens: Sequence[int] | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.vocab = vocab
        self.params = list(params)
        self.seeds = list(seeds) if seeds is not None else [1000 + i for i in range(len(params))]
        known = [list(t) for t in tokens] if tokens is not None else [[0]] * len(params)
        self.prompt_lens = list(prompt_lens) if prompt_lens is not None else [len(t) for t in known]
        self.lengths = np.array([len(t) for t in known], np.int64)
        self.tokens = torch.full((len(params), max(8, int(self.lengths.max()) + 1)), -1, dtype=torch.int32)
        for row, values in enumerate(known):
            self.tokens[row, : len(values)] = torch.tensor(values, dtype=torch.int32)
        self.stop_ids = list(stop_ids)

    def state(self) -> SamplingState:
        state = SamplingState(len(self.params), self.vocab, "cpu")
        for row, params in enumerate(self.params):
            start = RowStart(
                row, self.prompt_lens[row], 0, b"", b"", params, self.seeds[row] % (1 << 64), pack(self.stop_ids)
            )
            state.start(row, start)
        return state

    def sample(
        self,
        logits: torch.Tensor,
        cuts: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        torch_ops: bool = False,
        device: str = "cpu",
        masks: Masks | None = None,
    ) -> SampleOutput:
        """logits: float32 [S, vocab] of `rows` (all by default). All ranks must agree; rank 0's output is given.

        masks: of the first rows.
        """
        chosen = np.arange(len(self.params)) if rows is None else np.array(rows, np.int64)

        def work(comm: Communicator, start: int, count: int) -> SampleOutput:
            sampler = Sampler(comm, start, count, self.vocab, self.state(), device)
            if torch_ops:  # as on a GPU
                sampler._ops = TorchOps(start, count, torch.device("cpu"))
                sampler._host = False
            part = logits[:, start : start + count].contiguous().to(device)
            before = part.clone()
            local = None
            if masks is not None:
                places = np.arange(len(masks.rows) // 4)
                local = LocalMasks.of(masks, places, start, count, self.vocab)
            lengths = self.lengths[chosen]
            out = sampler.sample(part, chosen, lengths, self.tokens.to(device), lengths, local)
            assert masks is not None or torch.equal(part.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0)), (
                "the logits were changed"
            )
            return out

        outs = on_ranks(cuts or [0, self.vocab], work)
        for out in outs[1:]:
            assert torch.equal(out.tokens, outs[0].tokens)
            assert same_logprobs(out.logprobs, outs[0].logprobs)
            assert out.faults == outs[0].faults
        return outs[0]


def same_logprobs(a: Sequence[TokenLogprobs], b: Sequence[TokenLogprobs]) -> bool:
    return list(a) == list(b)


def cuts_of(vocab: int) -> list[list[int]]:
    """1, 2 and 3 ranks, unequal and empty slices among them."""
    third = vocab // 3
    return [
        [0, vocab],
        [0, vocab // 2, vocab],
        [0, vocab - 5, vocab],
        [0, third, 2 * third + 1, vocab],
        [0, 3, 3, vocab],
    ]
