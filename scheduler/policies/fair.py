"""Fair among tenants: the virtual token counter.

Sheng, Cao, Li, Zhu, Li, Zhuo, Gonzalez, Stoica: Fairness in Serving Large Language Models (OSDI 2024), algorithm 2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from math import isfinite

from treadle.errors import ConfigError

from .interface import Policy, Ticket, View

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0
MOST_IDLE = 4096


class FairPolicy(Policy):
    """A tenant pays for what it gets, and the one that has paid least is served next.

    Each tenant has a counter of service: `prompt_weight` for a prompt token computed, `output_weight` for a token of
    output, divided by the tenant's weight (1 if `weights` does not name it). Within a tenant: first come, first
    served. A tenant that comes back after it had nothing waiting is *lifted* to the least counter of those who wait
    (or to that of the last who did), so that nobody saves up service while idle.

    Guarantee: while two tenants both have requests waiting, the service that they get differs by no more than 2U,
    U = max(prompt_weight · longest prompt, output_weight · tokens that fit into the cache), each divided by the lesser
    weight (theorem 4.4 of the paper). It does not matter how many requests either of them sends.
    Starvation bound: the first request of a tenant waits for no more than 2U of service to each other tenant.
    Blocks running out, the youngest request of the tenant with the greatest counter gives way.
    """

    name = "fair"

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        prompt_weight: float = PROMPT_WEIGHT,
        output_weight: float = OUTPUT_WEIGHT,
    ) -> None:
        self.weights = dict(weights or {})
        for name, value in (*self.weights.items(), ("prompt_weight", prompt_weight), ("output_weight", output_weight)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not (isfinite(value) and value > 0):
                raise ConfigError(f"weight {name}={value!r}: a number above 0 is allowed")
        self._prompt_weight, self._output_weight = prompt_weight, output_weight
        self._counters: OrderedDict[str, float] = OrderedDict()
        self._last = 0.0

    def lane(self, ticket: Ticket) -> str:
        return ticket.tenant

    def lane_key(self, lane: str) -> float:
        return self._counters.get(lane, 0.0)

    def opens(self, lane: str, least: float | None) -> None:
        self._counters[lane] = max(self._counters.pop(lane, 0.0), self._last if least is None else least)

    def closes(self, lane: str) -> None:
        self._last = self._counters.get(lane, 0.0)

    def charge(self, lane: str, prompt_tokens: int, output_tokens: int) -> None:
        service = self._prompt_weight * prompt_tokens + self._output_weight * output_tokens
        self._counters[lane] = self._counters.get(lane, 0.0) + service / self.weights.get(lane, 1.0)
        if len(self._counters) > MOST_IDLE:
            self._forget()

    def victim(self, running: tuple[Ticket, ...], view: View) -> Ticket:
        return max(running, key=lambda ticket: (self._counters.get(ticket.tenant, 0.0), ticket.number))

    def _forget(self) -> None:
        """The tenant that opened longest ago: when it comes back it is lifted like a new one."""
        self._counters.popitem(last=False)
