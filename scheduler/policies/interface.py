"""What a scheduling policy is: answers to a few questions, asked only where rows change.

A policy owns nothing. The queues, rows and blocks are the core's; the policy gives keys, and picks among what it is
shown. Whatever it answers, and whatever it raises, no request is lost: a wrong answer is counted as PolicyFailed, and
that step goes on first come, first served (`guard.py`).

All methods run on the scheduler's thread, between steps: they must be quick, and the same questions in the same order
must give the same answers, or a recorded run cannot be replayed. Time is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import msgspec

from treadle.scheduler.cost_model import StepCosts, StepShape

LEAST_OUTPUT = 1


class Ticket(msgspec.Struct, frozen=True, eq=False, gc=False, kw_only=True):
    """One continuation, as a policy sees it. It stays the same object until the continuation ends.

    number: of arrival, unique and rising. tenant, priority (lower goes first): as submitted. arrival: when. deadline:
    when it must have ended, None for no matter. prompt_tokens: its length. least_tokens, most_tokens: of output.
    """

    number: int
    request_id: str
    index: int
    tenant: str
    priority: int
    arrival: float
    deadline: float | None
    prompt_tokens: int
    least_tokens: int
    most_tokens: int


@dataclass(slots=True, frozen=True)
class View:
    """The present, for a policy's eyes. now: seconds. waiting, running: continuations. free_blocks: of the KV cache.

    step_tokens: the budget of a step. costs: what has been learned of the price of a step, as it is now; a policy gets
    the numbers and not the model that learns them, so nothing that it does to them changes what the core reckons with.
    """

    now: float
    waiting: int
    running: int
    free_blocks: int
    step_tokens: int
    costs: StepCosts
    _cached: Callable[[Ticket], int]

    def cached_tokens(self, ticket: Ticket) -> int:
        """Tokens of a waiting continuation that the prefix cache holds now. Costs a look-up: a µs and more."""
        return self._cached(ticket)


class Policy:
    """Base of policies, and "first come, first served" as it stands. Override what should be otherwise.

    What is not overridden is never called. Order is made of three things: waiting continuations stand in *lanes*,
    inside a lane by `key`, and the lane of the least `lane_key` is served first. Who overrides neither `lane` nor
    `key` has one lane, by arrival. Keys are numbers, not NaN; among equals the earlier arrival goes first.

    name: for messages. window: how many of the first of a lane `pick` is shown, 1 to 256; with 1 it is not asked.
    """

    name = "policy"
    window = 1

    # ── the order of the waiting queue ──

    def key(self, ticket: Ticket, now: float) -> float:
        """Place within its lane, the least first. Asked once, when the request comes in."""
        return 0.0

    def lane(self, ticket: Ticket) -> str:
        """The queue it stands in. Asked once, when the request comes in."""
        return ""

    def lane_key(self, lane: str) -> float:
        """The lane with the least is served next. It may rise at any time; a fall is seen when the lane opens anew."""
        return 0.0

    def pick(self, window: tuple[Ticket, ...], view: View) -> Ticket:
        """Which of the first of the lane gets the next row; may be asked again before that row is there."""
        return window[0]

    def latest_start(self, ticket: Ticket, view: View) -> float:
        """When it is too late to begin: a continuation that still waits then is refused as DeadlineUnreachable.

        Asked for those with a deadline when they come in, and again at the time that was answered.
        """
        return inf

    # ── the running ──

    def victim(self, running: tuple[Ticket, ...], view: View) -> Ticket | None:
        """Who gives way when blocks run out; None is the last in the order of (key, arrival)."""
        return None

    def budget(self, step: StepShape, most: int, view: View) -> int:
        """Tokens of prompts in this step, 0 to `most`. step: the decodes that are in it already.

        Asked when there are prompts to compute. 0 is an error where nothing decodes, for then nothing would move.
        """
        return most

    # ── what a policy is told ──

    def opens(self, lane: str, least: float | None) -> None:
        """Somebody waits in a lane that was empty. least: the least key of the other lanes, None if all are empty."""

    def closes(self, lane: str) -> None:
        """Nobody waits in the lane any more."""

    def charge(self, lane: str, prompt_tokens: int, output_tokens: int) -> None:
        """The lane was served: prompt tokens computed (at the first admission, cached ones not), tokens of output."""

    def admitted(self, ticket: Ticket) -> None:
        """It has a row now."""
