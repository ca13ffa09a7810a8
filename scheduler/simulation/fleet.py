"""Many replicas: each gets its part of the workload and is simulated on its own, in this process or in several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from treadle.errors import ConfigError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.policies import Policy

from .parallel import run_parallel
from .replica import Replica
from .result import ReplicaResult
from .routing import route
from .sizes import MOST_REPLICAS, MOST_SECONDS, check_most, check_sizes
from .workload import Workload

FleetProgress = Callable[[int, float, int], None]
"""Replica, its simulated seconds, its requests that have come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is simulated. routing: a name in `ROUTING`. overhead: seconds of the scheduler between steps.

    jobs: processes that simulate; the results are the same whatever their number. policy: makes a policy of your own
    for each replica, instead of the one that the configuration names; then all are simulated in this process.
    """

    config: CoreConfig
    costs: StepCosts
    replicas: int = 1
    routing: str = "least-loaded"
    overhead: float = 0.0
    jobs: int = 1
    policy: Callable[[], Policy] | None = None

    def __post_init__(self) -> None:
        for name, value in (("replicas", self.replicas), ("jobs", self.jobs)):
            if value < 1:
                raise ConfigError(f"{name}={value}: it must be at least 1")
        if not 0 <= self.overhead <= MOST_SECONDS:  # also NaN, with which no time would ever be the next
            raise ConfigError(f"overhead={self.overhead}: it must be from 0 to {MOST_SECONDS:,} seconds")
        if self.policy is not None and not callable(self.policy):
            raise ConfigError(f"policy={self.policy!r}: what makes a policy is allowed, such as its class")
        check_most("replicas", self.replicas, MOST_REPLICAS)
        check_sizes(self.config)


@dataclass(frozen=True, slots=True)
class Part:
    """A replica's requests, by their place in the whole workload, and how they went."""

    indices: np.ndarray[tuple[int], np.dtype[np.intp]]
    result: ReplicaResult


def simulate(fleet: Fleet, workload: Workload, progress: FleetProgress | None = None) -> list[Part]:
    """Runs the workload to its end; one part per replica, in their order."""
    chosen = route(workload, fleet.replicas, fleet.routing, fleet.config, fleet.costs)
    order = np.argsort(chosen, kind="stable")
    indices = np.split(order, np.cumsum(np.bincount(chosen, minlength=fleet.replicas))[:-1])
    if min(fleet.jobs, fleet.replicas) > 1 and fleet.policy is None:
        results = run_parallel(fleet.config, fleet.costs, fleet.overhead, workload, indices, fleet.jobs, progress)
    else:
        results = [
            Replica(
                fleet.config,
                fleet.costs,
                workload.take(mine),
                overhead=fleet.overhead,
                policy=None if fleet.policy is None else fleet.policy(),
                progress=None if progress is None else partial(progress, i),
            ).run()
            for i, mine in enumerate(indices)
        ]
    return [Part(mine, result) for mine, result in zip(indices, results, strict=True)]
