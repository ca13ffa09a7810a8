"""Runs a recorded event log again through a core and verifies every decision.

The events are fed to a `RecordedCore` as before, and what it writes now must equal what it wrote then: a difference is
a core (or a policy) that decides otherwise, or one whose decisions depend on something that is not in the log.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from treadle.errors import ConfigError, EventLogError
from treadle.transport.codec import unpack
from treadle.transport.messages import StepPlan

from .event_log import (
    Aborted,
    Added,
    AnyEvent,
    Applied,
    Event,
    EventReader,
    Expired,
    Failed,
    FailedAll,
    Opened,
    Planned,
    Tail,
    WasReset,
)
from .policies import Policy
from .recording import RecordedCore, config_from_log
from .request import Output, Outputs, Request

_MOST_SHOWN = 200
Decision = Request | StepPlan | Outputs | list[Output] | None
Observer = Callable[[AnyEvent, Decision], None]
"""Is told of each event and what the core made of it; None where it raised, or had nothing to plan."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first decision that is not what the log says. event: its number in the file, from 0.

    what: the parts that differ; plans and outputs are in the log as checksums. decision: what was decided now.
    """

    event: int
    what: str
    decision: str

    def __str__(self) -> str:
        return f"event {self.event}: {self.what}; now it decides: {self.decision}"


@dataclass(slots=True)
class ReplayReport:
    """events: verified. cores: runs of a service in the file. tail: what could not be read. difference: if any."""

    events: int = 0
    cores: int = 0
    requests: int = 0
    steps: int = 0
    tail: Tail | None = None
    difference: Difference | None = None

    @property
    def good(self) -> bool:
        """Every decision is the same, and at most the last event was cut off."""
        return self.difference is None and (self.tail is None or self.tail.torn)


def replay(
    path: Path,
    *,
    check: bool = False,
    observer: Observer | None = None,
    own_policy: Callable[[], Policy] | None = None,
) -> ReplayReport:
    """Replays the file up to its end or the first difference. check: verify the core's invariants after each event.

    own_policy: makes the policy of cores that were given an object, which is not in the log. Raises EventLogError for a
    file that is not a log of this version, OSError for one that cannot be read, CoreInvariantError with `check`,
    ConfigError for an `own_policy` that makes none.
    """
    if own_policy is not None and not callable(own_policy):
        raise ConfigError(f"own_policy={own_policy!r}: what makes a policy is allowed, such as its class")
    report = ReplayReport()
    reader = EventReader(path)
    again = _Again(check, own_policy)
    for number, event in enumerate(reader):
        if isinstance(event, Opened):
            report.cores += 1
            again.open(event)
            decision: Decision = None
        else:
            decision = again.feed(event)
            what = _difference(event, again.made)
            if what:
                report.difference = Difference(number, what, describe(decision))
                return report
        report.requests += isinstance(event, Added) and not event.raised
        report.steps += isinstance(event, Applied) and not event.raised
        report.events += 1
        if observer is not None:
            observer(event, decision)
    report.tail = reader.tail
    return report


class _Again:
    """A core that gets the events again, with the seeds that were drawn. made: what it wrote down for the last."""

    def __init__(self, check: bool, own_policy: Callable[[], Policy] | None) -> None:
        self.made: Event | None = None
        self._check = check
        self._own_policy = own_policy
        self._core: RecordedCore | None = None
        self._seeds: list[int] = []

    def open(self, event: Opened) -> None:
        policy = None
        if event.own_policy:
            if self._own_policy is None:
                raise EventLogError(
                    f"recorded with a policy object, {event.own_policy!r}, which is not in the log: what it decided is "
                    "known to a program only, which gives own_policy=… to replay, read_event_log or costs_from_log"
                )
            policy = self._own_policy()
            if not isinstance(policy, Policy):
                raise ConfigError(f"own_policy made {policy!r}, which is no policy")
        self._core = RecordedCore(config_from_log(event.config), self._draw, self, policy)

    def write(self, event: Event) -> None:
        self.made = event

    def feed(self, event: AnyEvent) -> Decision:
        if self._core is None:
            raise EventLogError("the log does not begin with the configuration of a core")
        self.made = None
        decision: Decision = None
        try:
            decision = self._decide(self._core, event)
        except Exception:
            if self.made is None:  # not the core's, but ours
                raise
        if self._check:
            self._core.check()
        return decision

    def _decide(self, core: RecordedCore, event: AnyEvent) -> Decision:
        match event:
            case Added():
                self._seeds = list(event.seeds)
                return core.add(event.submit, event.now, bounded=event.bounded)
            case Aborted():
                return core.abort(event.id, event.now, event.index)
            case Planned():
                return core.plan(event.now)
            case Applied():
                return core.apply(event.result, event.now, event.seconds)
            case WasReset():
                return core.reset(event.now)
            case Expired():
                return core.expire(event.now)
            case Failed():
                return core.fail(event.id, event.index, event.code, event.message, event.now)
            case FailedAll():
                return core.fail_all(event.code, event.message, event.now)
            case Opened():
                return None

    def _draw(self) -> int:
        """One seed more than was drawn then is a difference, which the numbers of seeds will show."""
        return self._seeds.pop(0) if self._seeds else 0


def describe(decision: Decision) -> str:
    """For a person who looks for a difference."""
    if isinstance(decision, Request):
        return f"{decision.id} is accepted"
    if isinstance(decision, StepPlan):
        work = ", ".join(f"{r}:{c}" for r, c in zip(unpack(decision.rows), unpack(decision.counts), strict=True))
        starts = ", ".join(f"row {start.row} with {len(start.tokens) // 4} tokens" for start in decision.start)
        return _short(f"step {decision.step}, starts [{starts}], tokens by row [{work}]")
    if decision is None:
        return "nothing, or an error"
    outputs = decision.each() if isinstance(decision, Outputs) else decision
    parts = (f"{o.sequence.request.id}/{o.sequence.index} {o.tokens} {o.finish}".rstrip() for o in outputs)
    return _short(", ".join(parts) or "no outputs")


def _difference(then: Event, now: Event | None) -> str:
    """What is not the same, in words; "" when all is."""
    if then == now:
        return ""
    found = list(_fields(type(then).__name__, then, now))
    return "; ".join(found) or f"{then!r} then, {now!r} now"


def _fields(name: str, then: object, now: object) -> list[str]:
    if then == now:
        return []
    if isinstance(then, msgspec.Struct) and type(then) is type(now):
        before, after = msgspec.structs.asdict(then), msgspec.structs.asdict(now)
        return list(itertools.chain.from_iterable(_fields(f"{name}.{f}", before[f], after[f]) for f in before))
    return [f"{name} is {_short(repr(now))}, the log has {_short(repr(then))}"]


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
