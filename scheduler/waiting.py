"""Sequences that have no row, in the order in which they will get one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf

from treadle.kvcache.invariant import require

from .config import CoreConfig
from .cost_model import CostModel
from .lanes import Lanes, Queue
from .ordered_queue import OrderedQueue
from .policies import Ticket, View
from .policies.guard import Guard
from .request import Sequence
from .running import Running


@dataclass(slots=True)
class Load:
    """What waits, of one tenant."""

    requests: int = 0
    tokens: int = 0


class Waiting:
    """Two orders of the same sequences: by arrival, which is the truth, and as the policy wants them.

    A sequence is placed by the policy once. Whoever is preempted comes back to its place. One that the policy could
    not place stands among the others by its arrival. When the policy fails, the order of arrival holds for that step.
    Where the policy has no places to give, there is the first order alone. count, tokens, tenants: of all who wait.
    """

    def __init__(self, config: CoreConfig, guard: Guard, running: Running, costs: CostModel) -> None:
        self._config = config
        self._guard = guard
        self._running = running
        self._costs = costs
        self._arrivals: OrderedQueue[int, Sequence] = OrderedQueue()
        self._lanes = Lanes(guard)
        self._strays: OrderedQueue[int, Sequence] = OrderedQueue()
        self._latest: OrderedQueue[tuple[float, int], Sequence] = OrderedQueue()
        self.count = 0
        self.tokens = 0
        self.tenants: dict[str, Load] = {}

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._arrivals)

    def earliest(self, count: int) -> list[Sequence]:
        """The first so many, by arrival."""
        return self._arrivals.smallest(count)

    def check(self) -> None:
        """Raises CoreInvariantError unless both orders hold the same, and tenants are counted right."""
        require(self.count == len(self._arrivals), "those who wait are miscounted")
        here = Counter(id(sequence) for sequence in self._arrivals)
        placed = Counter(id(s) for s in (*self._lanes, *self._strays))
        require(placed == (here if self._guard.has_place else Counter()), "the policy's order lost somebody")
        loads = Counter(sequence.request.tenant for sequence in self._arrivals)
        require(loads == {tenant: load.requests for tenant, load in self.tenants.items()}, "tenants are miscounted")
        require(sum(load.tokens for load in self.tenants.values()) == self.tokens, "tokens of tenants are miscounted")
        require({id(s) for s in self._latest} <= set(here), "one that waits no longer may still be refused")

    # ── in and out ──

    def enter(self, sequence: Sequence, now: float) -> None:
        """Begins to wait for the first time."""
        if self._guard.has_place:
            place = self._guard.place(sequence.ticket, now)
            sequence.placed = place is not None
            if place is not None:
                sequence.lane, sequence.key = place
        self.push(sequence)
        if self._guard.has_latest_start and sequence.request.deadline is not None:
            self._set_latest(sequence, self.latest_start(sequence, now))

    def push(self, sequence: Sequence) -> None:
        """Waits again, in its old place."""
        self._arrivals.push(sequence.order, sequence)
        if self._guard.has_place:
            if sequence.placed:
                self._lanes.push(sequence)
            else:
                self._strays.push(sequence.order, sequence)
        tenant = sequence.request.tenant
        load = self.tenants.get(tenant)
        if load is None:
            load = self.tenants[tenant] = Load()
        tokens = sequence.known
        load.requests += 1
        load.tokens += tokens
        self.count += 1
        self.tokens += tokens

    def remove(self, sequence: Sequence) -> None:
        """Waits no longer: it has a row, or has ended."""
        self._arrivals.remove(sequence.order)
        if self._guard.has_place:
            if sequence.placed:
                self._lanes.remove(sequence)
            else:
                self._strays.remove(sequence.order)
        if sequence.latest < inf:
            self._latest.remove((sequence.latest, sequence.order))
        tokens = sequence.known
        self.count -= 1
        self.tokens -= tokens
        tenant = sequence.request.tenant
        load = self.tenants[tenant]
        load.requests -= 1
        load.tokens -= tokens
        if not load.requests:
            del self.tenants[tenant]

    def extend(self, sequence: Sequence, token: bytes) -> None:
        """A waiting sequence's token came back late: it was in flight when the sequence was preempted."""
        sequence.tokens += token
        self.tokens += 1
        self.tenants[sequence.request.tenant].tokens += 1

    # ── who is next ──

    def first(self, now: float) -> Sequence | None:
        """Who gets the next row."""
        if not self.count:
            return None
        chosen = None if self._guard.broken else self._choose(now)
        if chosen is None or self._guard.broken:
            return self._arrivals.first()
        stray = self._strays.first()
        return stray if stray is not None and stray.order < chosen.order else chosen

    def _choose(self, now: float) -> Sequence | None:
        queue: Queue | OrderedQueue[int, Sequence] | None = self._arrivals
        if self._guard.has_place:
            queue = self._lanes.next()
        if queue is None:
            return None  # only strays wait, or the policy failed
        if self._guard.window == 1:
            return queue.first()
        window = queue.smallest(self._guard.window)
        tickets = tuple(sequence.ticket for sequence in window)
        picked = self._guard.pick(tickets, self.view(now, {s.order: s for s in window}))
        return next((sequence for sequence in window if sequence.ticket is picked), None)

    # ── what is too late ──

    def next_latest(self) -> float | None:
        """When to ask `too_late`."""
        key = self._latest.first_key()
        return None if key is None else key[0]

    def too_late(self, now: float) -> Iterator[Sequence]:
        """Those that cannot end in time any more, however soon they begin. Others are set to their new latest start."""
        while (key := self._latest.first_key()) is not None and key[0] <= now:
            sequence = self._latest.first()
            if sequence is None:
                return
            self._latest.remove(key)
            latest = self.latest_start(sequence, now)
            self._set_latest(sequence, latest)
            if latest <= now:
                yield sequence

    def latest_start(self, sequence: Sequence, now: float) -> float:
        return self._guard.latest_start(sequence.ticket, self.view(now, {sequence.order: sequence}))

    def _set_latest(self, sequence: Sequence, latest: float) -> None:
        sequence.latest = latest
        if latest < inf:
            self._latest.push((latest, sequence.order), sequence)

    # ── what a policy sees ──

    def view(self, now: float, shown: dict[int, Sequence] | None = None) -> View:
        """shown: the sequences whose cached prefix may be asked for, by number."""
        return View(
            now,
            len(self._arrivals),
            self._running.rows.count,
            self._running.cache.pool.available,
            self._config.max_num_batched_tokens,
            self._costs.coefficients,
            partial(_cached_tokens, self._running, shown or {}),
        )


def _cached_tokens(running: Running, shown: dict[int, Sequence], ticket: Ticket) -> int:
    sequence = shown.get(ticket.number)
    return 0 if sequence is None else running.cached_tokens(sequence)
