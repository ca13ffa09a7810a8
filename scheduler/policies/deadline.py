"""Earliest deadline first, and no work for what is late anyway."""

from __future__ import annotations

from math import inf, isfinite

from treadle.errors import ConfigError
from treadle.scheduler.cost_model import chunk_pairs

from .interface import Policy, Ticket, View

PATIENCE_SECONDS = 60.0


class DeadlinePolicy(Policy):
    """The earliest deadline goes first; a request without one stands as if it had `patience` seconds.

    A request that cannot end in time any more, even if it began now and had the machine for itself, is refused with
    DeadlineUnreachable: when it comes in, or while it waits, at the moment when it becomes so. What that takes at
    least is reckoned with the learned costs: the prompt tokens that are not cached, and one step for each token that
    it must give at least. Before anything is learned nobody is refused.

    Guarantee: nobody gets a row while one with an earlier deadline waits. With a cost model that does not
    overestimate, nobody is refused who could have met the deadline.
    Starvation bound: one without a deadline is overtaken only by deadlines within `patience` seconds of its arrival,
    so by nobody who arrives later than that; one with a deadline ends by it.
    """

    name = "deadline"

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int | float) or not (isfinite(patience)):
            raise ConfigError(f"patience={patience!r}: a finite number of seconds is allowed")
        self.patience = float(patience)

    def key(self, ticket: Ticket, now: float) -> float:
        return ticket.arrival + self.patience if ticket.deadline is None else ticket.deadline

    def latest_start(self, ticket: Ticket, view: View) -> float:
        return inf if ticket.deadline is None else ticket.deadline - least_seconds(ticket, view)


def least_seconds(ticket: Ticket, view: View) -> float:
    """What it takes alone on the machine: its prompt in full steps, then its least output one by one."""
    costs, prompt = view.costs, ticket.prompt_tokens
    fresh = prompt - view.cached_tokens(ticket)
    prefill_steps = -(-fresh // view.step_tokens)
    prefill = prefill_steps * costs.step + fresh * costs.prefill_token + chunk_pairs(fresh, prompt) * costs.chunk_pair
    decodes = ticket.least_tokens - 1
    context = decodes * prompt + decodes * (decodes + 1) // 2
    return prefill + decodes * (costs.step + costs.decode_row) + context * costs.context_token
