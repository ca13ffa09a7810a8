"""What the steps of a simulated replica bring: made-up tokens, cut out of a pool."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from treadle.scheduler.config import CoreConfig
from treadle.transport.codec import pack
from treadle.transport.messages import StepPlan

_POOL: Final = 1 << 16


class Answers(Protocol):
    """Stands for the engine. A test puts one here that executes the plans."""

    def answer(self, plan: StepPlan, samples: int) -> bytes:
        """int32, one token for each of the so many rows of the plan that sample."""
        ...


class MadeUpAnswers:
    """Never looks at the plan: `SimulatedEngine` and `FakeEngine` do, and tests run all three beside each other.

    A token may be EOS, which no request of a workload heeds: its length is known.
    """

    def __init__(self, config: CoreConfig) -> None:
        random = np.random.Generator(np.random.PCG64(0))
        self._pool = pack(random.integers(0, config.vocab_size, _POOL + config.max_num_seqs))
        self._at = 0

    def answer(self, plan: StepPlan, samples: int) -> bytes:
        at = self._at = (self._at + samples) % _POOL
        return self._pool[4 * at : 4 * (at + samples)]
