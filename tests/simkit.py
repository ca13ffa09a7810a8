"""Small simulations for tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.simulation.replica import Replica
from treadle.scheduler.simulation.result import ReplicaResult
from treadle.scheduler.simulation.workload import Workload, make_workload

SECOND = StepCosts(step=1.0)
CONFIG = CoreConfig(
    num_blocks=65, block_size=4, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64, vocab_size=1000
)


def config(**changes: object) -> CoreConfig:
    return replace(CONFIG, **changes)  # type: ignore[arg-type]


def work(*requests: tuple[float, int, int], **columns: object) -> Workload:
    """Requests of (arrival, input, output)."""
    arrival, inputs, outputs = zip(*requests, strict=True)
    return make_workload(arrival, inputs, outputs, **columns)  # type: ignore[arg-type]


def run(
    workload: Workload, costs: StepCosts = SECOND, overhead: float = 0.0, **changes: object
) -> tuple[list[float], list[float], ReplicaResult]:
    """When each request got its first token and when it ended."""
    result = Replica(config(**changes), costs, workload, overhead=overhead).run()
    return np.frombuffer(result.first).tolist(), np.frombuffer(result.finish).tolist(), result


def random_work(seed: int, count: int, most: int, prefixes: Sequence[int] = (-1,)) -> Workload:
    """Requests of up to `most` tokens of input and of output, close to each other."""
    random = np.random.default_rng(seed)
    inputs = random.integers(1, most, count)
    prefix = random.choice(prefixes, count)
    shared = np.where(prefix < 0, 0, np.minimum(inputs - 1, most // 2))
    return make_workload(
        random.exponential(1.5, count).cumsum(),
        inputs,
        random.integers(1, most, count),
        prefix=prefix,
        prefix_tokens=shared,
    )
