"""A policy that raises or answers nonsense is named, and hurts nobody."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from math import nan
from typing import Any

import pytest

from tests.corekit import Rig, config
from tests.policykit import ChaosPolicy, step
from treadle import LLM
from treadle.errors import ConfigError, PolicyFailed
from treadle.scheduler.cost_model import StepShape
from treadle.scheduler.policies import FcfsPolicy, Policy, Ticket, View

TIGHT = config(num_blocks=9, max_num_seqs=3, max_num_batched_tokens=12)


def fill(rig: Rig, count: int = 8) -> None:
    for i in range(count):
        prompt = [(i * 5 + j) % 100 for j in range(3 + 3 * (i % 3))]
        rig.add(str(i), prompt, max_tokens=6, ignore_eos=True, tenant="ab"[i % 2], timeout=1000.0)


class Raises(Policy):
    """Raises in the method that it is told."""

    name = "raises"
    window = 3
    where = ""

    def _do(self, method: str, right: Any) -> Any:
        if method == self.where:
            raise RuntimeError("mine to fail")
        return right

    def key(self, ticket: Ticket, now: float) -> float:
        return self._do("key", 0.0)  # type: ignore[no-any-return]

    def lane(self, ticket: Ticket) -> str:
        return self._do("lane", ticket.tenant)  # type: ignore[no-any-return]

    def lane_key(self, lane: str) -> float:
        return self._do("lane_key", 0.0)  # type: ignore[no-any-return]

    def pick(self, window: tuple[Ticket, ...], view: View) -> Ticket:
        return self._do("pick", window[-1])  # type: ignore[no-any-return]

    def latest_start(self, ticket: Ticket, view: View) -> float:
        return self._do("latest_start", 1e9)  # type: ignore[no-any-return]

    def victim(self, running: tuple[Ticket, ...], view: View) -> Ticket:
        return self._do("victim", running[0])  # type: ignore[no-any-return]

    def budget(self, step: StepShape, most: int, view: View) -> int:
        return self._do("budget", most)  # type: ignore[no-any-return]

    def opens(self, lane: str, least: float | None) -> None:
        self._do("opens", None)

    def closes(self, lane: str) -> None:
        self._do("closes", None)

    def charge(self, lane: str, prompt_tokens: int, output_tokens: int) -> None:
        self._do("charge", None)

    def admitted(self, ticket: Ticket) -> None:
        self._do("admitted", None)


METHODS = [name for name in vars(Raises) if not name.startswith("_") and name not in ("name", "window", "where")]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_raises_is_named(method: str) -> None:
    policy = Raises()
    policy.where = method
    rig = Rig(TIGHT, policy)
    fill(rig)
    rig.drain()
    error = rig.core.policy_error
    assert isinstance(error, PolicyFailed)
    place = f"test_policy_guard.py:{Raises._do.__code__.co_firstlineno + 2}"
    assert str(error) == (
        f"policy 'raises': {method} raised RuntimeError: mine to fail ({place}); the step goes on first come, first "
        "served"
    )
    assert rig.core.stats().policy_errors == rig.core.policy_errors > 0
    policy.where = ""
    errors = rig.core.policy_errors
    rig.add("after", [1, 2], max_tokens=2)
    rig.drain()
    assert rig.core.policy_errors == errors, "a policy that has come to its senses is asked again"


def test_a_policy_that_has_to_be_waited_for_is_refused() -> None:
    class Tells(Policy):
        name = "tells"

        async def admitted(self, ticket: Ticket) -> None:  # type: ignore[override]
            await asyncio.sleep(1)

    with pytest.raises(ConfigError, match="policy 'tells': admitted is async"):
        Rig(TIGHT, Tells())


@pytest.mark.parametrize("kind", [asyncio.CancelledError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_what_is_no_exception_goes_no_further_either(kind: type[BaseException]) -> None:
    """A service asks on a thread of its own. On the main thread a KeyboardInterrupt is somebody's Ctrl-C."""

    class Stops(Policy):
        name = "stops"

        def key(self, ticket: Ticket, now: float) -> float:
            raise kind("of mine\nin two lines")

    rig = Rig(TIGHT, Stops())
    with ThreadPoolExecutor(1) as threads:
        threads.submit(rig.add, "a", [1, 2], max_tokens=2).result(timeout=30)
    said = f"policy 'stops': key raised {kind.__name__}: of mine in two lines (test_policy_guard.py:"
    assert str(rig.core.policy_error).startswith(said)
    rig.drain()
    if kind is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            rig.add("b", [1])


def test_the_methods_are_all_of_them() -> None:
    assert set(METHODS) == {name for name, value in vars(Policy).items() if callable(value)}
    rig = Rig(TIGHT, Raises())
    fill(rig)
    rig.drain()
    assert rig.core.policy_errors == 0


STRANGER = Ticket(
    number=10**6,
    request_id="0",
    index=0,
    tenant="",
    priority=0,
    arrival=0.0,
    deadline=None,
    prompt_tokens=1,
    least_tokens=1,
    most_tokens=1,
)


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("key", nan),
        ("key", None),
        ("key", "1"),
        ("key", True),
        ("key", 10**400),
        ("lane", 7),
        ("lane_key", nan),
        ("pick", None),
        ("pick", 0),
        ("pick", STRANGER),
        ("latest_start", nan),
        ("victim", STRANGER),
        ("victim", "youngest"),
        ("budget", -1),
        ("budget", 1.0),
        ("budget", True),
        ("budget", 10**9),
        ("budget", None),
    ],
)
def test_nonsense_is_told_and_the_step_is_first_come_first_served(method: str, answer: object) -> None:
    class Nonsense(Raises):
        name = "nonsense"

        def _do(self, asked: str, right: Any) -> Any:
            return answer if asked == method else right

    rig = Rig(TIGHT, Nonsense())
    fill(rig)
    started = [ticket.number for _ in range(60) for ticket in step(rig)]
    rig.drain()
    assert f"policy 'nonsense': {method} " in str(rig.core.policy_error)
    if method in ("key", "lane", "lane_key", "pick"):
        first_starts = list(dict.fromkeys(started))
        assert first_starts == sorted(first_starts)


def test_a_ticket_that_runs_or_has_ended_cannot_be_picked_again() -> None:
    class Repeats(Policy):
        name = "repeats"
        window = 8
        first: Ticket | None = None

        def pick(self, window: tuple[Ticket, ...], view: View) -> Ticket:
            self.first = self.first or window[-1]
            return self.first

    rig = Rig(config(max_num_seqs=2), Repeats())
    fill(rig, 6)
    rig.drain()
    assert "pick gave Ticket(" in str(rig.core.policy_error)


def test_nothing_gets_by_with_a_budget_of_nothing() -> None:
    class Miser(Policy):
        name = "miser"

        def budget(self, step: StepShape, most: int, view: View) -> int:
            return 0

    rig = Rig(TIGHT, Miser())
    fill(rig)
    rig.drain()
    assert "budget gave 0; allowed is an int from 1 to 12" in str(rig.core.policy_error)


def test_a_ticket_cannot_be_changed() -> None:
    rig = Rig()
    ticket = rig.add("a", [1], max_tokens=1).sequences[0].ticket
    with pytest.raises(AttributeError):
        ticket.number = 7  # type: ignore[misc]
    with pytest.raises(AttributeError):
        rig.core._waiting.view(0.0).now = 1.0  # type: ignore[misc]


def test_the_costs_that_a_policy_sees_cannot_be_changed_and_are_those_of_now() -> None:
    rig = Rig()
    before = rig.core._waiting.view(0.0).costs
    with pytest.raises(AttributeError):
        before.step = 7.0  # type: ignore[misc]
    rig.core.costs.observe(StepShape(0, 0, 0), 0.25)
    after = rig.core._waiting.view(0.0).costs
    now = rig.core.costs.predict(StepShape(0, 0, 0))
    assert before.predict(StepShape(0, 0, 0)) == 0.0
    assert after.predict(StepShape(0, 0, 0)) == now == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("seed", range(12))
def test_chaos_changes_nobodys_answer(seed: int) -> None:
    """The fake engine checks every context, the rig every token and, after each event, every invariant."""
    rig = Rig(TIGHT, ChaosPolicy(seed))
    for i in range(10):
        rig.add(str(i), [i, 2, i, 4], max_tokens=5, ignore_eos=True, tenant=str(i % 3))
        step(rig)
    rig.drain()
    assert rig.core.policy_errors


class Unnamed(Policy):
    name = ""


class Wide(Policy):
    name = "wide"
    window = 1000


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (object(), "is not a policy; allowed are a name"),
        (FcfsPolicy, "is not a policy"),
        (7, "policy: 7 is not a policy"),
        (Unnamed(), "1 to 64 characters"),
        (Wide(), "window=1000: allowed is an int from 1 to 256"),
    ],
)
def test_what_is_no_policy_is_refused_at_once(policy: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM("smollm2-135m", policy=policy)  # type: ignore[arg-type]


def test_an_object_needs_the_scheduler_in_this_process() -> None:
    with pytest.raises(ConfigError, match="policy='fcfs': an object works only with in_process=True"):
        LLM("smollm2-135m", policy=FcfsPolicy(), in_process=False)
    with pytest.raises(ConfigError, match="policy='best': allowed are"):
        LLM("smollm2-135m", policy="best")
