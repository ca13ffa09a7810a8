"""Priorities that age."""

from __future__ import annotations

from math import isfinite

from treadle.errors import ConfigError

from .interface import Policy, Ticket

AGEING_SECONDS = 10.0


class PriorityPolicy(Policy):
    """The lower `priority` number goes first, and each `ageing` seconds of waiting make up for one step of it.

    Ageing at a constant rate does not change the order of two who both wait, so the key is fixed at arrival:
    arrival + priority · ageing.

    Guarantee: among equal priorities first come, first served. A request is overtaken only by those of a lower number
    who arrive less than (difference of priorities) · ageing seconds after it.
    Starvation bound: with priorities of at least L, nobody who arrives (priority − L) · ageing seconds later is before
    it. Blocks running out, the last in this order gives way.
    """

    name = "priority"

    def __init__(self, ageing: float = AGEING_SECONDS) -> None:
        if isinstance(ageing, bool) or not isinstance(ageing, int | float) or not (isfinite(ageing) and ageing >= 0):
            raise ConfigError(f"ageing={ageing!r}: a number of seconds from 0 is allowed")
        self.ageing = float(ageing)

    def key(self, ticket: Ticket, now: float) -> float:
        return ticket.arrival + ticket.priority * self.ageing
