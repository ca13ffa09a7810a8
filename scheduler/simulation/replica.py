"""One replica in virtual time: a core, an engine that takes as long as the cost model says, and what comes.

It does what `scheduler/step_loop.py` does, in the same order: a request is added and a plan made at once if the
pipeline has room; plans are sent as they are made and executed one after the other; a result is applied, the next plan
is made, and then its tokens are delivered. So a step begins when it was sent or when the one before it ended, if that
is later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from treadle.errors import TreadleError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import CostModel, StepCosts
from treadle.scheduler.policies import Policy
from treadle.scheduler.request import Output, Outputs
from treadle.transport.messages import SamplingParams, StepResult, Submit

from .engine import Executed, SimulatedEngine
from .events import EventHeap, Kind
from .histogram import Histogram
from .prompts import Prompts
from .timeline import Moment, Timeline
from .workload import Workload

NEVER = -1.0
FINISHED = ("stop", "length")

Progress = Callable[[float, int], None]
"""Simulated seconds, and requests that have come so far."""
_PROGRESS_STEPS = 512


class ReplicaResult(msgspec.Struct, array_like=True):
    """first, finish: float64 [requests], seconds from the beginning of the first token and of the end, -1 for never.

    ends: how many requests ended in which way: "length", "deadline", or the code of an error. seconds: when all was
    over. busy: seconds in steps. row_seconds: rows times seconds of the steps that they were in.
    """

    first: bytes
    finish: bytes
    ends: dict[str, int]
    seconds: float
    steps: int
    busy: float
    row_seconds: float
    between: list[int]
    width: float
    timeline: list[Moment]
    stats: dict[str, int]


class Replica:
    """Runs a workload to its end. overhead: seconds of the scheduler between a result and the next plan's departure.

    policy: instead of the one that the configuration names. The core knows the costs, which a service has to learn.
    """

    def __init__(
        self,
        config: CoreConfig,
        costs: StepCosts,
        workload: Workload,
        *,
        overhead: float = 0.0,
        policy: Policy | None = None,
        engine: SimulatedEngine | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._costs = CostModel(costs)
        self.core = Core(config, draw_seed=lambda: 0, policy=policy, costs=self._costs)
        self._engine = SimulatedEngine(config) if engine is None else engine
        self._workload = workload
        self._prompts = Prompts(workload, config.vocab_size)
        self._overhead = overhead
        self._progress = progress
        self._events = EventHeap()
        self._flights: deque[tuple[Executed, float, float]] = deque()
        self._params: dict[int, SamplingParams] = {}
        self._arrivals: list[float] = workload.arrival.tolist()
        self._next = 0
        self._free_at = 0.0
        self._applied_at = 0.0
        self._deadline_at = float("inf")
        self._first = [NEVER] * len(workload)
        self._finish = [NEVER] * len(workload)
        self._ends: dict[str, int] = {}
        self._steps = 0
        self._busy = self._row_seconds = 0.0
        self._between = Histogram()
        self._timeline = Timeline()

    def run(self) -> ReplicaResult:
        now = 0.0
        if self._arrivals:
            self._events.push(self._arrivals[0], Kind.ARRIVAL)
        while self._events:
            time, kind = self._events.pop()
            if kind == Kind.DEADLINE and self.core.next_deadline() is None:
                self._deadline_at = float("inf")  # whoever had it has ended
                continue
            now = time
            if now >= self._timeline.due:
                self._timeline.add(now, self._moment())
            if kind == Kind.RESULT:
                self._apply(now)
            elif kind == Kind.ARRIVAL:
                self._arrive(now)
            else:
                self._expire(now)
        return self._result(now)

    # ── what happens ──

    def _arrive(self, now: float) -> None:
        index = self._next
        self._next += 1
        if self._next < len(self._arrivals):
            self._events.push(self._arrivals[self._next], Kind.ARRIVAL)
        try:
            request = self.core.add(self._submit(index), now)
        except TreadleError as error:
            self._ends[error.code] = self._ends.get(error.code, 0) + 1
            return
        request.context = index
        self._pump(now)

    def _apply(self, now: float) -> None:
        executed, cost, _ = self._flights.popleft()
        result = StepResult(executed.step, 0, 0, executed.tokens, round(cost * 1e6))
        if self._flights:
            self._events.push(self._flights[0][2], Kind.RESULT)
        outputs = self.core.apply(result, now)
        self._pump(now, self._overhead)
        self._note(executed, outputs, now)

    def _expire(self, now: float) -> None:
        self._deadline_at = float("inf")
        self._end(self.core.expire(now), now)
        self._pump(now)

    def _pump(self, now: float, delay: float = 0.0) -> None:
        """Plans while the pipeline has room. Only the oldest step in flight is in the heap: others are behind it."""
        while (plan := self.core.plan(now)) is not None:
            executed = self._engine.run(plan)
            cost = self._costs.predict(executed.shape)
            self._free_at = max(now + delay, self._free_at) + cost
            self._flights.append((executed, cost, self._free_at))
            if len(self._flights) == 1:
                self._events.push(self._free_at, Kind.RESULT)
            self._steps += 1
            self._busy += cost
            self._row_seconds += cost * (len(plan.rows) // 4)
        deadline = self.core.next_deadline()
        if deadline is not None and deadline < self._deadline_at:
            self._deadline_at = deadline
            self._events.push(max(deadline, now), Kind.DEADLINE)

    def _submit(self, index: int) -> Submit:
        workload, output = self._workload, int(self._workload.outputs[index])
        params = self._params.get(output)
        if params is None:
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0)
            self._params[output] = params
        return Submit(
            id=str(index),
            tokens=self._prompts[index],
            params=params,
            timeout=float(workload.timeout[index]),
            priority=int(workload.priority[index]),
            tenant=workload.tenants[workload.tenant[index]],
        )

    # ── what is remembered ──

    def _note(self, executed: Executed, outputs: Outputs, now: float) -> None:
        if executed.shape.decode_rows:
            self._between.add(now - self._applied_at, executed.shape.decode_rows)
        self._applied_at = now
        if executed.recent:
            first = self._first
            for sequence in outputs.sequences[-executed.recent :]:
                index: int = sequence.request.context  # type: ignore[assignment]
                if first[index] == NEVER:
                    first[index] = now
        if outputs.others:
            self._end(outputs.others, now)
        if self._progress is not None and not executed.step % _PROGRESS_STEPS:
            self._progress(now, self._next)

    def _end(self, outputs: list[Output], now: float) -> None:
        for output in outputs:
            index: int = output.sequence.request.context  # type: ignore[assignment]
            if output.tokens and self._first[index] == NEVER:
                self._first[index] = now
            if output.finish:
                way = output.error_code or output.finish
                self._ends[way] = self._ends.get(way, 0) + 1
                if output.finish in FINISHED:
                    self._finish[index] = now

    def _moment(self) -> Moment:
        stats = self.core.stats()
        return Moment(stats.running, stats.waiting, stats.blocks_used, stats.generated_tokens, stats.preemptions)

    def _result(self, now: float) -> ReplicaResult:
        stats = msgspec.structs.asdict(self.core.stats())
        return ReplicaResult(
            first=np.array(self._first).tobytes(),
            finish=np.array(self._finish).tobytes(),
            ends=self._ends,
            seconds=now,
            steps=self._steps,
            busy=self._busy,
            row_seconds=self._row_seconds,
            between=self._between.counts,
            width=self._timeline.width,
            timeline=self._timeline.moments,
            stats={name: value for name, value in stats.items() if isinstance(value, int)},
        )
