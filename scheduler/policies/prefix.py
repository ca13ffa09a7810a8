"""Longest cached prefix first, with an end to everybody's patience."""

from __future__ import annotations

from treadle.errors import ConfigError

from .interface import Policy, Ticket, View

WINDOW, PATIENCE = 32, 64


class PrefixPolicy(Policy):
    """Of the `window` oldest that wait, the one with the most tokens in the prefix cache; among equals the oldest.

    Those who share a prefix run together while it is in the cache, instead of having it computed again later. Who has
    been chosen stays chosen until there is room for it.

    Guarantee: the oldest that waits is overtaken at most `patience` times, then it is next.
    Starvation bound: one with k before it has a row after at most (k + 1)(patience + 1) admissions. Blocks running
    out, the youngest gives way.
    """

    name = "prefix"

    def __init__(self, window: int = WINDOW, patience: int = PATIENCE) -> None:
        if type(window) is not int or not 1 <= window <= 256:
            raise ConfigError(f"window={window!r}: allowed is 1 to 256")
        if type(patience) is not int or patience < 0:
            raise ConfigError(f"patience={patience!r}: an int from 0 is allowed")
        self.window = window
        self.patience = patience
        self._chosen = -1
        self._oldest = -1
        self._overtaken: dict[int, int] = {}

    def pick(self, window: tuple[Ticket, ...], view: View) -> Ticket:
        oldest = window[0]
        if oldest.number != self._oldest:
            self._turn_to(oldest)
        if self._overtaken[oldest.number] >= self.patience:
            return oldest
        chosen = next((ticket for ticket in window if ticket.number == self._chosen), None)
        if chosen is None:
            chosen = max(window, key=view.cached_tokens)  # the first of those with the most
            self._chosen = chosen.number
        return chosen

    def admitted(self, ticket: Ticket) -> None:
        if ticket.number > self._oldest and self._oldest in self._overtaken:
            self._overtaken[self._oldest] += 1

    def _turn_to(self, oldest: Ticket) -> None:
        """One that was preempted may be the oldest for a while; those behind it keep their count meanwhile."""
        self._oldest = oldest.number
        self._overtaken = {number: count for number, count in self._overtaken.items() if number >= oldest.number}
        self._overtaken.setdefault(oldest.number, 0)
