"""Sends what is due when it is due, whatever the endpoint does, and notes what comes back when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field

from .plan import Ask, Plan
from .target import Refused, Target, Usage


@dataclass(slots=True)
class Record:
    """What happened to one request. Times are seconds from the beginning of the run.

    due: when it should have been sent, which is where its latency begins: an endpoint that is slow, or a generator that
    is late, delays what comes after it, and that delay is the user's. sent: when it was. pieces: when something of the
    answer came. error: "" or the kind of failure; message: what was said of it. usage: tokens, as the endpoint counted.
    """

    ask: Ask
    due: float
    sent: float = 0.0
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(0, 0))
    error: str = ""
    message: str = ""

    @property
    def ttft(self) -> float:
        return self.pieces[0] - self.due

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first; None where there is only one."""
        later = self.usage.output - 1
        return (self.pieces[-1] - self.pieces[0]) / later if later > 0 else None

    @property
    def end_to_end(self) -> float:
        return self.pieces[-1] - self.due

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.pieces, self.pieces[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Driver:
    """most: requests open at once, 0 is no bound; what is due meanwhile waits here, and its latency grows.

    patience: seconds for a request that brings no timeout of its own. clock: seconds. seen: told of each that ended.
    """

    target: Target
    clock: Callable[[], float]
    most: int = 0
    patience: float = 3600.0
    seen: Callable[[Record], None] = lambda record: None

    async def run(self, plan: Plan) -> list[Record]:
        """In the order of the plan. Failures are in the records; only cancellation is raised."""
        gate = asyncio.Semaphore(self.most) if self.most else nullcontext()
        began = self.clock()
        records = []
        async with asyncio.TaskGroup() as group:
            for ask in plan.asks:
                delay = began + ask.arrival - self.clock()
                if delay > 0:
                    await asyncio.sleep(delay)
                records.append(Record(ask, ask.arrival))
                group.create_task(self._one(records[-1], began, plan.timed, gate))
        return records

    async def _one(self, record: Record, began: float, timed: bool, gate: AbstractAsyncContextManager[object]) -> None:
        async with gate:
            record.sent = self.clock() - began
            if not timed:
                record.due = record.sent
            patience = self.patience if record.ask.timeout is None else record.ask.timeout
            try:
                async with asyncio.timeout(max(0.0, record.due + patience - record.sent)):
                    record.usage = await self.target.ask(
                        record.ask, lambda _: record.pieces.append(self.clock() - began)
                    )
                if not record.pieces:
                    raise Refused("Empty", "the answer had nothing in it")
            except TimeoutError:
                record.error, record.message = "Timeout", f"no whole answer within {patience:g} s"
            except Refused as error:
                record.error, record.message = error.kind, str(error)
            record.ended = self.clock() - began
            self.seen(record)


def most_at_once(records: Sequence[Record]) -> int:
    """Requests that the endpoint had at the same time, at the most."""
    changes = sorted([(r.sent, 1) for r in records] + [(r.ended, -1) for r in records])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
