"""One replica in virtual time: a core, an engine that takes as long as the cost model says, and what comes.

It does what `scheduler/step_loop.py` does, in the same order: a request is added and a plan made at once if the
pipeline has room; plans are sent as they are made and executed one after the other; a result is applied, the next plan
is made, and then its tokens are delivered. So a step begins when it was sent or when the one before it ended, if that
is later.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from treadle.errors import TreadleError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import CostModel, StepCosts
from treadle.scheduler.policies import Policy
from treadle.scheduler.request import Output, Sequence
from treadle.transport.messages import SamplingParams, StepPlan, StepResult, Submit

from .answers import Answers, MadeUpAnswers
from .flight import TimedFlight
from .histogram import Histogram
from .offer import Offer
from .prompts import offers
from .result import ReplicaResult
from .timeline import Moment, Timeline
from .workload import Workload

NEVER: Final = -1.0
_NEVER_AGAIN: Final = float("inf")
FINISHED: Final = ("stop", "length")

Progress = Callable[[float, int], None]
"""Simulated seconds, and requests that have come so far."""
_PROGRESS_STEPS: Final = 512


class Replica:
    """Runs a workload to its end. overhead: seconds of the scheduler between a result and the next plan's departure.

    policy: instead of the one that the configuration names. answers: what steps bring. The core knows the costs, which
    a service has to learn, and what a step of it costs goes by the shape that it planned.
    """

    def __init__(
        self,
        config: CoreConfig,
        costs: StepCosts,
        workload: Workload,
        *,
        overhead: float = 0.0,
        policy: Policy | None = None,
        answers: Answers | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._costs = CostModel(costs)
        self.core = Core(config, draw_seed=lambda: 0, policy=policy, costs=self._costs)
        self._policy = config.policy if policy is None else policy.name
        self._answers = MadeUpAnswers(config) if answers is None else answers
        self._tenants = workload.tenants
        self._depth = config.pipeline_depth
        self._overhead = overhead
        self._progress = progress
        self._offers: Iterator[Offer] = offers(workload, config.vocab_size)
        self._offer = next(self._offers, None)
        self._came = 0
        self._flights: deque[TimedFlight] = deque()
        self._params: dict[int, SamplingParams] = {}
        self._unheard: list[Sequence] = []
        self._free_at = 0.0
        self._applied_at = 0.0
        self._first = array("d", [NEVER]) * len(workload)
        self._finish = array("d", [NEVER]) * len(workload)
        self._ends: dict[str, int] = {}
        self._steps = 0
        self._busy = self._row_seconds = 0.0
        self._between = Histogram()
        self._timeline = Timeline()

    def run(self) -> ReplicaResult:
        """What happens at one instant happens in this order: deadlines, a result, an arrival. So a token that comes at
        its deadline comes too late, as in a service (`Core.apply` ends the overdue first), and whoever arrives finds
        the room that the others left."""
        now = 0.0
        core, flights, timeline = self.core, self._flights, self._timeline
        while True:
            result = flights[0].ends if flights else _NEVER_AGAIN
            arrival = self._offer.arrival if self._offer is not None else _NEVER_AGAIN
            deadline = core.next_deadline()
            due = _NEVER_AGAIN if deadline is None else max(deadline, now)
            time = result if result < arrival else arrival
            time = time if time < due else due
            if time == _NEVER_AGAIN:
                return self._result(now)
            now = time
            if now >= timeline.due:
                timeline.add(now, self._moment())
            if result == now:
                self._apply(now)
            elif due == now:
                self._end(core.expire(now), now)
                self._pump(now)
            else:
                self._arrive(now)

    # ── what happens ──

    def _arrive(self, now: float) -> None:
        offer = self._offer
        if offer is None:
            return
        self._offer = next(self._offers, None)
        index = self._came
        self._came += 1
        try:
            request = self.core.add(self._submit(index, offer), now)
        except TreadleError as error:
            self._ends[error.code] = self._ends.get(error.code, 0) + 1
            return
        request.context = index
        self._pump(now)

    def _apply(self, now: float) -> None:
        flight = self._flights.popleft()
        outputs = self.core.apply(StepResult(flight.step, 0, 0, flight.tokens, 0), now)
        self._pump(now, self._overhead)
        if flight.decode_rows:
            self._between.add(now - self._applied_at, flight.decode_rows)
        self._applied_at = now
        if flight.started or self._unheard:
            self._unheard += flight.started
            self._unheard = [sequence for sequence in self._unheard if not self._heard(sequence, now)]
        if outputs.others:
            self._end(outputs.others, now)
        if self._progress is not None and not flight.step % _PROGRESS_STEPS:
            self._progress(now, self._came)

    def _pump(self, now: float, delay: float = 0.0) -> None:
        """Plans while the pipeline has room."""
        core, flights = self.core, self._flights
        while len(flights) < self._depth and (plan := core.plan(now)) is not None:
            shape = core.last_shape
            cost = self._costs.predict(shape)
            self._free_at = max(now + delay, self._free_at) + cost
            tokens = self._answers.answer(plan, core.last_samples)
            started = self._new(plan) if plan.start else []
            flights.append(TimedFlight(plan.step, tokens, shape.decode_rows, self._free_at, started))
            self._steps += 1
            self._busy += cost
            self._row_seconds += cost * (len(plan.rows) // 4)

    def _submit(self, index: int, offer: Offer) -> Submit:
        params = self._params.get(offer.outputs)
        if params is None:
            params = SamplingParams(temperature=0.0, max_tokens=offer.outputs, ignore_eos=True, seed=0)
            self._params[offer.outputs] = params
        return Submit(
            id=str(index),
            tokens=offer.prompt,
            params=params,
            timeout=offer.timeout,
            priority=offer.priority,
            tenant=self._tenants[offer.tenant],
        )

    # ── what is remembered ──

    def _new(self, plan: StepPlan) -> list[Sequence]:
        """Who has a row by this plan and no token yet: only these are looked at, from the step's result on."""
        first = self._first
        return [s for s in self.core.started(plan) if first[_index(s)] == NEVER]

    def _heard(self, sequence: Sequence, now: float) -> bool:
        """Whether it needs no look any more: it has its first token, or has ended."""
        if sequence.finish:
            return True
        if self.core.running.length(sequence) == sequence.request.prompt_len:
            return False
        self._first[_index(sequence)] = now
        return True

    def _end(self, outputs: list[Output], now: float) -> None:
        for output in outputs:
            index = _index(output.sequence)
            if output.tokens and self._first[index] == NEVER:
                self._first[index] = now
            if output.finish:
                way = output.error_code or output.finish
                self._ends[way] = self._ends.get(way, 0) + 1
                if output.finish in FINISHED:
                    self._finish[index] = now

    def _moment(self) -> Moment:
        core = self.core
        running = core.running
        return Moment(
            running.rows.count, core.waiting.count, running.cache.pool.used, core.generated_tokens, core.preemptions
        )

    def _result(self, now: float) -> ReplicaResult:
        stats = msgspec.structs.asdict(self.core.stats())
        error = self.core.policy_error
        return ReplicaResult(
            first=self._first.tobytes(),
            finish=self._finish.tobytes(),
            ends=self._ends,
            seconds=now,
            steps=self._steps,
            busy=self._busy,
            row_seconds=self._row_seconds,
            between=self._between.counts,
            width=self._timeline.width,
            timeline=self._timeline.moments,
            stats={name: value for name, value in stats.items() if isinstance(value, int)},
            policy=self._policy,
            policy_error="" if error is None else str(error),
        )


def _index(sequence: Sequence) -> int:
    index: int = sequence.request.context  # type: ignore[assignment]  # it was put there by `_arrive`
    return index
