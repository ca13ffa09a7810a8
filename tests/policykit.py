"""Policies for tests: one that answers at random, often wrongly, and the watching of who starts when."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf, nan
from typing import Any

from tests.corekit import Rig
from treadle.scheduler.cost_model import StepShape
from treadle.scheduler.policies import Policy, Ticket, View


class ChaosPolicy(Policy):
    """Every method lies, raises, or is right, as the dice fall; the same seed does the same."""

    name = "chaos"
    window = 4

    def __init__(self, seed: int, wrong: float = 0.3) -> None:
        self._random = random.Random(seed)
        self._wrong = wrong
        self._seen: list[Ticket] = []

    def _answer(self, right: Callable[[], Any]) -> Any:
        if self._random.random() >= self._wrong:
            return right()
        wrong = self._random.choice([None, nan, "x", -1, 10**400, True, [], 1.5, inf, -inf, "ticket", "raise", "exit"])
        if wrong == "raise":
            raise self._random.choice([ValueError("no"), KeyError(1), ZeroDivisionError(), RecursionError()])
        if wrong == "exit":
            raise SystemExit(3)
        return self._random.choice(self._seen) if wrong == "ticket" and self._seen else wrong

    def key(self, ticket: Ticket, now: float) -> float:
        self._seen.append(ticket)
        return self._answer(lambda: self._random.choice([0, -1.5, now, 1e300]))  # type: ignore[no-any-return]

    def lane(self, ticket: Ticket) -> str:
        return self._answer(lambda: self._random.choice(["", "a", "b"]))  # type: ignore[no-any-return]

    def lane_key(self, lane: str) -> float:
        return self._answer(self._random.random)  # type: ignore[no-any-return]

    def pick(self, window: tuple[Ticket, ...], view: View) -> Ticket:
        view.cached_tokens(window[-1])
        return self._answer(lambda: self._random.choice(window))  # type: ignore[no-any-return]

    def latest_start(self, ticket: Ticket, view: View) -> float:
        return self._answer(lambda: view.now + self._random.choice([-1.0, 0.0, 1.0, inf]))  # type: ignore[no-any-return]

    def victim(self, running: tuple[Ticket, ...], view: View) -> Ticket | None:
        return self._answer(lambda: self._random.choice([*running, None]))  # type: ignore[no-any-return]

    def budget(self, step: StepShape, most: int, view: View) -> int:
        return self._answer(lambda: self._random.randint(0, most))  # type: ignore[no-any-return]

    def opens(self, lane: str, least: float | None) -> None:
        self._answer(lambda: None)

    def closes(self, lane: str) -> None:
        self._answer(lambda: None)

    def charge(self, lane: str, prompt_tokens: int, output_tokens: int) -> None:
        assert prompt_tokens >= 0 <= output_tokens and prompt_tokens + output_tokens > 0
        self._answer(lambda: None)

    def admitted(self, ticket: Ticket) -> None:
        self._answer(lambda: None)


def waiting(rig: Rig) -> dict[int, Ticket]:
    """Who waits, by number."""
    return {sequence.order: sequence.ticket for sequence in rig.core._waiting}


def step(rig: Rig, seconds: float = 0.0) -> list[Ticket]:
    """Plans and applies one step; the tickets that got a row in it, in order. Nothing when there is nothing to do."""
    plan = rig.plan()
    if plan is None:
        return []
    owners = rig.core._running.rows.owner
    started = [owners[start.row].ticket for start in plan.start]
    rig.apply(seconds=seconds)
    return started
