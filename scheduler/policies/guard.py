"""Between the core and a policy: nothing that a policy answers or raises goes further than this file."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from math import inf
from threading import current_thread, main_thread
from typing import TypeVar

from treadle.errors import ConfigError, PolicyFailed
from treadle.scheduler.cost_model import StepShape

from .interface import Policy, Ticket, View

Answer = TypeVar("Answer")
MOST_WINDOW = 256
_MOST_NAME = 64
_NUMBER = "a float or an int, and not NaN"
_OUR_FRAMES = 2
"""Between a call of a policy and where it was asked."""


class Guard:
    """Asks a policy and checks what it says. A wrong answer is None here, and `broken` until the next step.

    errors: how many there were. error: the last one. The flags say what the policy overrides: nothing else is asked.
    """

    def __init__(self, policy: Policy) -> None:
        self.name, self.window = _check(policy)
        self._policy = policy
        kind = type(policy)
        self.has_place = kind.key is not Policy.key or kind.lane is not Policy.lane
        self.has_lanes = kind.lane is not Policy.lane
        self.has_victim = kind.victim is not Policy.victim
        self.has_budget = kind.budget is not Policy.budget
        self.has_latest_start = kind.latest_start is not Policy.latest_start
        self.has_charge = kind.charge is not Policy.charge
        self.has_admitted = kind.admitted is not Policy.admitted
        self.broken = False
        self.errors = 0
        self.error: PolicyFailed | None = None

    def place(self, ticket: Ticket, now: float) -> tuple[str, float] | None:
        """Lane and key; None for one that the policy could not place. Only where it `has_place`."""
        lane = self._ask("lane", lambda: self._policy.lane(ticket), _is_text, "text") if self.has_lanes else ""
        key = self._ask("key", lambda: self._policy.key(ticket, now), _is_number, _NUMBER)
        return None if lane is None or key is None else (lane, float(key))

    def lane_key(self, lane: str) -> float | None:
        key = self._ask("lane_key", lambda: self._policy.lane_key(lane), _is_number, _NUMBER)
        return None if key is None else float(key)

    def pick(self, window: tuple[Ticket, ...], view: View) -> Ticket | None:
        def one_of_them(answer: object) -> bool:
            return any(answer is ticket for ticket in window)

        return self._ask("pick", lambda: self._policy.pick(window, view), one_of_them, "a ticket of the window")

    def victim(self, running: tuple[Ticket, ...], view: View) -> Ticket | None:
        """None for the last in order."""

        def one_of_them(answer: object) -> bool:
            return answer is None or any(answer is ticket for ticket in running)

        return self._ask("victim", lambda: self._policy.victim(running, view), one_of_them, "a running ticket, or None")

    def budget(self, step: StepShape, most: int, view: View) -> int | None:
        least = 0 if step.decode_rows else 1

        def in_range(answer: object) -> bool:
            return type(answer) is int and least <= answer <= most

        return self._ask(
            "budget", lambda: self._policy.budget(step, most, view), in_range, f"an int from {least} to {most}"
        )

    def latest_start(self, ticket: Ticket, view: View) -> float:
        latest = self._ask("latest_start", lambda: self._policy.latest_start(ticket, view), _is_number, _NUMBER)
        return inf if latest is None else float(latest)

    def opens(self, lane: str, least: float | None) -> None:
        self._tell("opens", lambda: self._policy.opens(lane, least))

    def closes(self, lane: str) -> None:
        self._tell("closes", lambda: self._policy.closes(lane))

    def charge(self, lane: str, prompt_tokens: int, output_tokens: int) -> None:
        self._tell("charge", lambda: self._policy.charge(lane, prompt_tokens, output_tokens))

    def admitted(self, ticket: Ticket) -> None:
        self._tell("admitted", lambda: self._policy.admitted(ticket))

    def _tell(self, method: str, call: Callable[[], object]) -> None:
        self._ask(method, call, _anything, "")

    def _ask(
        self, method: str, call: Callable[[], Answer], allowed: Callable[[object], bool], what: str
    ) -> Answer | None:
        try:
            answer = call()
            if allowed(answer):
                return answer
            problem = f"gave {_show(answer)}; allowed is {what}"
        except BaseException as error:  # a stranger's code
            if isinstance(error, KeyboardInterrupt) and current_thread() is main_thread():
                raise  # somebody's Ctrl-C: it comes to this thread alone
            problem = f"raised {type(error).__name__}: {_show(error)}{_place(error)}"
        self.broken = True
        self.errors += 1
        self.error = PolicyFailed(
            f"policy {self.name!r}: {method} {problem}; the step goes on first come, first served"
        )
        return None


def _check(policy: object) -> tuple[str, int]:
    """Name and window. Raises ConfigError for an object that is not a policy."""
    if not isinstance(policy, Policy):
        raise ConfigError(
            f"policy: {_show(policy)} is not a policy; allowed are a name, and an object of a class that extends "
            "treadle.scheduler.policies.Policy"
        )
    name, window = policy.name, policy.window
    if type(name) is not str or not 0 < len(name) <= _MOST_NAME:
        raise ConfigError(f"policy {_show(policy)}: its name must be text of 1 to {_MOST_NAME} characters")
    for kind in type(policy).__mro__:
        for method, value in vars(kind).items():
            if method in vars(Policy) and inspect.iscoroutinefunction(value):
                raise ConfigError(f"policy {name!r}: {method} is async; allowed is a plain method, for no step waits")
    if type(window) is not int or not 1 <= window <= MOST_WINDOW:
        raise ConfigError(f"policy {name!r}: window={_show(window)}: allowed is an int from 1 to {MOST_WINDOW}")
    return name, window


def _place(error: BaseException) -> str:
    """Where the policy raised it: a message alone rarely says which line is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    if len(frames) <= _OUR_FRAMES:
        return ""
    return f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})"


def _is_number(answer: object) -> bool:
    """An int beyond any float raises here, and so in `_ask`."""
    if type(answer) is float:
        return answer == answer
    return isinstance(answer, int | float) and not isinstance(answer, bool) and float(answer) == float(answer)


def _is_text(answer: object) -> bool:
    return type(answer) is str


def _anything(answer: object) -> bool:
    return True


def _show(value: object) -> str:
    """A short, printable form in one line, whatever the object does when asked for one."""
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value)
    except BaseException:  # a stranger's code, too
        return f"{type(value).__name__} (cannot be shown)"
    text = " ".join(text.encode("ascii", "backslashreplace").decode().splitlines())
    return text if len(text) <= 120 else text[:117] + "..."
