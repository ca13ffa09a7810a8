"""Sampling parameters by row on the device, for the fused sampler: the few that it reads, packed as int64 words.

A row that starts travels as `pack_params(start, vocab_size)`; whoever applies the plan's deltas on the device copies
those words to the row's place in `DeviceParams.storage`. Floats are float64 whose bits stand in the word.

| word | constant      | holds                                                                            |
|------|---------------|----------------------------------------------------------------------------------|
| 0    | `FLAGS`       | `state.RANDOM` and `state.FILTERED`, and nothing else; 0 is greedy                |
| 1    | `NOISE`       | the request's seed after the first half of `noise.noise_keys`                     |
| 2    | `TEMPERATURE` | float64                                                                          |
| 3    | `TOP_K`       | integer; the size of the vocabulary where there is none                          |
| 4    | `TOP_P`       | float64                                                                          |
| 5    | `MIN_P`       | float64                                                                          |
| 6, 7 |               | 0: a row is one 64-byte piece                                                    |
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from treadle.transport.messages import RowStart

from .noise import seed_base
from .state import FILTERED, GREEDY_BELOW, RANDOM

WORDS = 8
FLAGS, NOISE, TEMPERATURE, TOP_K, TOP_P, MIN_P = range(6)

Int64 = npt.NDArray[np.int64]


def pack_params(start: RowStart, vocab_size: int) -> Int64:
    """int64 [WORDS]: what the fused sampler needs of a row."""
    params = start.params
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    flags = 0
    if params.temperature >= GREEDY_BELOW:
        filtered = top_k < vocab_size or params.top_p < 1 or params.min_p > 0
        flags = RANDOM | (FILTERED if filtered else 0)
    words = np.zeros(WORDS, np.int64)
    floats = words.view(np.float64)
    words[FLAGS] = flags
    words[NOISE] = seed_base(np.array([start.seed & 0xFFFFFFFFFFFFFFFF], np.uint64)).view(np.int64)[0]
    floats[TEMPERATURE] = max(params.temperature, GREEDY_BELOW)
    words[TOP_K] = top_k
    floats[TOP_P] = params.top_p
    floats[MIN_P] = params.min_p
    return words


@dataclass(frozen=True)
class DeviceParams:
    """storage: int64 [max_rows, WORDS], contiguous, on the logits' device. Zeros are a greedy row."""

    storage: torch.Tensor
    vocab_size: int

    @classmethod
    def empty(cls, max_rows: int, vocab_size: int, device: torch.device | str) -> DeviceParams:
        return cls(torch.zeros((max_rows, WORDS), dtype=torch.int64, device=device), vocab_size)

    def write(self, row: int, start: RowStart) -> None:
        """One row by a small copy that waits for the device: for tests and slow paths."""
        self.storage[row] = torch.from_numpy(pack_params(start, self.vocab_size)).to(self.storage.device)
