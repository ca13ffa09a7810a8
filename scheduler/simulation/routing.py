"""Who gets a request: rules of a router in front of many replicas, by what the router itself knows.

The router sees every request pass and thinks of it as open until it should have ended, by the cost model and the rows
that it believes to be on that replica; it is not told when it really ends. So replicas depend on nobody and can be
simulated one by one, in parallel. A real router sees ends as they happen: here its picture is smoother, and wrong when
a replica falls behind (docs/simulator.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from treadle.errors import ConfigError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import CostModel, StepCosts, StepShape, chunk_pairs

from .workload import Workload

_STICKY_SHARE, _STICKY_ROWS = 1.25, 4


@dataclass(slots=True)
class RouterView:
    """open: requests that each replica is thought to have. leaving: when they are thought to end."""

    replicas: int
    most: int
    costs: CostModel
    open: list[int] = field(default_factory=list)
    leaving: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open = [0] * self.replicas

    def advance(self, now: float) -> None:
        leaving = self.leaving
        while leaving and leaving[0][0] <= now:
            self.open[heapq.heappop(leaving)[1]] -= 1

    def enter(self, replica: int, now: float, inputs: int, outputs: int) -> None:
        """Prefill alone, then a decode step per token beside the rows that are there; rows beyond `most` take turns."""
        self.open[replica] += 1
        count = self.open[replica]
        rows = min(count, self.most)
        context = inputs + outputs // 2
        prefill = self.costs.predict(StepShape(inputs, 0, 0, chunk_pairs(inputs, inputs)))
        decode = self.costs.predict(StepShape(0, rows, rows * context))
        heapq.heappush(self.leaving, (now + (prefill + outputs * decode) * count / rows, replica))

    def least(self) -> int:
        return self.open.index(min(self.open))


class Rule(Protocol):
    """Chooses the replica of a request. prefix: the number of its shared prefix, -1 for none."""

    def choose(self, view: RouterView, index: int, prefix: int) -> int: ...


class RoundRobin:
    def choose(self, view: RouterView, index: int, prefix: int) -> int:
        return index % view.replicas


class LeastLoaded:
    """The replica with the fewest open requests, the first of them."""

    def choose(self, view: RouterView, index: int, prefix: int) -> int:
        return view.least()


class PrefixAffinity:
    """Where this prefix went last, unless that replica has a quarter (and 4 requests) more than its share."""

    def __init__(self) -> None:
        self._home: dict[int, int] = {}

    def choose(self, view: RouterView, index: int, prefix: int) -> int:
        if prefix < 0:
            return view.least()
        home = self._home.get(prefix)
        if home is not None and view.open[home] <= _STICKY_SHARE * sum(view.open) / view.replicas + _STICKY_ROWS:
            return home
        self._home[prefix] = chosen = view.least()
        return chosen


ROUTING: Mapping[str, Callable[[], Rule]] = MappingProxyType(
    {"round-robin": RoundRobin, "least-loaded": LeastLoaded, "prefix-affinity": PrefixAffinity}
)


def route(workload: Workload, replicas: int, rule: str, config: CoreConfig, costs: StepCosts) -> npt.NDArray[np.int32]:
    """The replica of each request. Raises ConfigError for a rule that there is not."""
    made = ROUTING.get(rule)
    if made is None:
        raise ConfigError(f"routing={rule!r}: allowed are {', '.join(ROUTING)}")
    if replicas == 1:
        return np.zeros(len(workload), np.int32)
    if made is RoundRobin:
        return np.arange(len(workload), dtype=np.int32) % replicas
    return np.fromiter(
        _choices(workload, made(), RouterView(replicas, config.max_num_seqs, CostModel(costs))), np.int32
    )


def _choices(workload: Workload, rule: Rule, view: RouterView) -> Iterator[int]:
    columns = (workload.arrival, workload.inputs, workload.outputs, workload.prefix)
    for index, (now, inputs, outputs, prefix) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        view.advance(now)
        replica = rule.choose(view, index, prefix)
        view.enter(replica, now, inputs, outputs)
        yield replica
