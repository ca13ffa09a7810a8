"""The scheduler core: events in, plans and outputs out. No clock, no socket, no thread, no randomness of its own.

    core.add(submit, now)        a request begins to wait
    core.plan(now)               the next step, or None
    core.apply(result, now, s)   what that step brought, in s seconds; results come in the order of the plans
    core.abort(id, now)          at any time
    core.masks_due()             steps whose guided rows can be told which tokens they may sample
    core.reset(now)              the engine died; everything unfinished will be computed again
    core.expire(now)             deadlines, at `next_deadline()`

What is here holds these together: `planner.py` makes the steps, `results.py` takes what they brought, `unfinished.py`
has the requests and their ends, `rows.py` the state of what runs. docs/scheduler.md has the walk of a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import msgspec

from treadle.errors import DeadlineUnreachable, EngineFailed, PolicyFailed, ProtocolError
from treadle.transport.messages import Stats, StepPlan, StepResult, Submit, TenantFigures

from .admission import Admission
from .config import CoreConfig
from .cost_model import CostModel, StepCosts, StepShape
from .flight import Flight
from .guidance.pending import MasksDue, PendingMasks
from .invariants import CoreInvariantError as CoreInvariantError
from .invariants import check_core
from .planner import Planner
from .policies import Policy, make_policy
from .policies.guard import Guard
from .request import Output, Outputs, Request, Sequence
from .results import Results
from .running import Running
from .snapshot import snapshot
from .unfinished import Unfinished
from .waiting import Waiting


class Core:
    """One scheduler. draw_seed: an unsigned 64-bit seed for a request that brings none.

    policy: instead of the one that `config.policy` names; the core is its only user. costs: of a step, learned already.
    Raises ConfigError for an object that is no policy.
    """

    def __init__(
        self,
        config: CoreConfig,
        draw_seed: Callable[[], int],
        policy: Policy | None = None,
        costs: CostModel | None = None,
    ) -> None:
        self.config = config
        self.costs = CostModel(_measured(config)) if costs is None else costs
        self._guard = Guard(make_policy(config.policy) if policy is None else policy)
        self._running = Running(config, self._guard, self.costs)
        self._waiting = Waiting(config, self._guard, self._running, self.costs)
        self._planner = Planner(config, self._running, self._waiting, self._guard, self.costs)
        self._admission = Admission(config, draw_seed)
        self._unfinished = Unfinished(config.vocab_size, self._running, self._waiting, self._admission)
        self._results = Results(config.vocab_size, self._running, self._waiting, self._unfinished)
        self._flights: deque[Flight] = deque()
        self._masks = PendingMasks(self._running)
        self._unsaid: list[Output] = []
        self._step = 0
        self._recoveries = 0

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, submit: Submit, now: float, *, bounded: bool = True) -> Request:
        """A request begins to wait. `submit.params` has been checked by `check_params`.

        Raises InvalidRequest and its kinds (empty prompt, ids out of range, a prompt that can never fit, an id that
        is in use), Overloaded, and DeadlineUnreachable where the policy knows. Nothing has changed then.

        bounded: False for one that was accepted before, by another core: no bound keeps it out.
        """
        room = self._planner.room if bounded else None
        request = self._admission.accept(submit, now, self._waiting, self._unfinished.requests, room)
        late = False
        for sequence in request.sequences:
            if not sequence.finish:
                self._waiting.enter(sequence, now)
                late = late or sequence.latest < now
        if late:
            for sequence in request.sequences:
                if not sequence.finish:
                    self._waiting.remove(sequence)
            self._admission.refused += 1
            raise DeadlineUnreachable(_unreachable(request, now))
        self._unfinished.add(request)
        return request

    def abort(self, request_id: str, now: float, index: int = -1) -> list[Output]:
        """Ends a request wherever it is, or one continuation of it; what is unknown or has ended is left alone."""
        request = self._unfinished.requests.get(request_id)
        if request is None:
            return []
        if index < 0:
            return self._unfinished.end_request(request, "abort", now)
        chosen = request.sequences[index : index + 1]
        return [self._unfinished.end(Output(sequence), "abort", now) for sequence in chosen if not sequence.finish]

    def fail(self, request_id: str, index: int, code: str, message: str, now: float) -> list[Output]:
        """Ends one continuation with "error", wherever it is; what is unknown or has ended is left alone."""
        request = self._unfinished.requests.get(request_id)
        chosen = request.sequences[index : index + 1] if request is not None else []
        errors = [Output(sequence, error_code=code, error=message) for sequence in chosen if not sequence.finish]
        return [self._unfinished.end(error, "error", now) for error in errors]

    def fail_all(self, code: str, message: str, now: float) -> list[Output]:
        """Ends every request with "error": nothing will run any more."""
        outputs: list[Output] = []
        for request in list(self._unfinished.requests.values()):
            outputs += self._unfinished.end_request(request, "error", now, code, message)
        return outputs

    def expire(self, now: float) -> list[Output]:
        """Ends requests whose deadline has passed or cannot be met any more, and hands out what `plan` found so."""
        outputs, self._unsaid = self._unsaid, []
        if self._guard.has_latest_start:
            for sequence in self._waiting.too_late(now):
                error = _unreachable(sequence.request, now)
                failed = Output(sequence, error_code=DeadlineUnreachable.code, error=error)
                outputs.append(self._unfinished.end(failed, "error", now))
        deadline = self._unfinished.first_deadline
        if deadline is not None and deadline <= now:
            outputs += self._unfinished.end_overdue(now)
        return outputs

    def next_deadline(self) -> float | None:
        """When to call `expire`; a time that has passed means now."""
        if self._unsaid:
            return 0.0
        deadline = self._unfinished.first_deadline
        if not self._guard.has_latest_start:
            return deadline
        latest = self._waiting.next_latest()
        return deadline if deadline is None or latest is None else min(deadline, latest)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> StepPlan | None:
        """The next step; None when nothing can run now or `pipeline_depth` plans are in flight."""
        if len(self._flights) >= self.config.pipeline_depth:
            return None
        self._unsaid = self.expire(now)
        composed = self._planner.compose(self._step, now)
        if composed is None:
            return None
        plan, flight = composed
        self._flights.append(flight)
        self._step += 1
        if self._running.rows.guided_count:
            plan = msgspec.structs.replace(plan, guided=self._masks.enter(flight))
        return plan

    def masks_due(self) -> list[MasksDue]:
        """Steps whose guided rows now know every token before the one that they will sample; each step comes once.

        A plan that names guided rows is answered only after the ranks have got its masks, so whoever drives a core
        with guided requests has to ask after each `plan` and each `apply`.
        """
        return self._masks.take()

    def apply(self, result: StepResult, now: float, seconds: float = 0.0) -> Outputs:
        """Commits what the oldest step in flight brought. seconds: that it took, for the cost model; 0 is not known.

        A sequence that has ended meanwhile gets nothing: its token is discarded. One that was preempted meanwhile
        gets its token. Raises ProtocolError, before anything has changed, for a result that does not fit the plan.
        """
        flight = self._expect(result)
        sampled = self._results.read(flight, result)
        self._flights.popleft()
        self.costs.observe(flight.shape, seconds)
        self._masks.drop(flight.step)
        outputs = Outputs(self.expire(now))
        self._results.commit(flight, result, sampled, outputs, now)
        self._planner.trials.clear(outputs)
        return outputs

    def reset(self, now: float) -> list[Output]:
        """The engine group died: plans in flight, rows and K/V are gone.

        Whoever ran waits again in its old place with its committed tokens. A request that was in flight at
        `max_engine_failures` deaths in a row, and brought no token in between, ends with "error". How the one at fault
        is told from those beside it: `trials.py`.
        """
        suspects = self._in_flight_requests()
        self._flights.clear()
        self._masks.clear()
        for sequence in self._running.forget():
            self._waiting.push(sequence)
        self._recoveries += 1
        outputs: list[Output] = []
        for request in suspects:
            request.failures += 1
            if request.failures >= self.config.max_engine_failures:
                message = f"the engine died {request.failures} times in a row while this request was running"
                outputs += self._unfinished.end_request(request, "error", now, EngineFailed.code, message)
        self._planner.trials.begin(suspects)
        self._planner.blocked = None
        return outputs

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def in_flight(self) -> int:
        """Plans whose result has not come."""
        return len(self._flights)

    @property
    def last_shape(self) -> StepShape:
        """Of the newest plan in flight; an empty one when there is none."""
        return self._flights[-1].shape if self._flights else StepShape(0, 0, 0)

    @property
    def last_samples(self) -> int:
        """How many rows of that plan sample, each of which its result has to bring a token."""
        return self._flights[-1].samples if self._flights else 0

    @property
    def has_work(self) -> bool:
        """Some request is unfinished."""
        return bool(self._unfinished.requests)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._unfinished.requests)

    @property
    def policy_errors(self) -> int:
        """How often the policy failed."""
        return self._guard.errors

    @property
    def policy_error(self) -> PolicyFailed | None:
        """The last time that it did."""
        return self._guard.error

    @property
    def generated_tokens(self) -> int:
        """That were committed."""
        return self._results.generated

    @property
    def preemptions(self) -> int:
        return self._planner.preemptions

    def stats(self) -> Stats:
        pool, host = self._running.cache.pool, self._running.cache.host
        return Stats(
            step=self._step,
            running=self._running.rows.count,
            waiting=len(self._waiting),
            finished=self._unfinished.finished,
            preemptions=self.preemptions,
            recoveries=self._recoveries,
            refused=self._admission.refused,
            prompt_tokens=self._running.prompt_tokens,
            cached_prompt_tokens=self._running.cached_prompt_tokens,
            generated_tokens=self.generated_tokens,
            blocks_total=pool.total,
            blocks_used=pool.used,
            blocks_cached=pool.cached,
            evictions=pool.evictions,
            policy_errors=self._guard.errors,
            recomputed_tokens=self._running.recomputed_tokens,
            swapped_preemptions=self._running.swapping.swapped,
            cpu_blocks_total=host.total,
            cpu_blocks_used=len(host.kept),
            cpu_hit_tokens=self._running.host_tokens,
            swapped_out_blocks=host.saved,
            swapped_in_blocks=host.fetched,
            cpu_evictions=host.evictions,
        )

    def started(self, plan: StepPlan) -> list[Sequence]:
        """Whose the rows are that the newest plan starts; ask before anything else happens."""
        owner = self._running.rows.owner
        return [owner[start.row] for start in plan.start]

    def tenants(self) -> list[TenantFigures]:
        """Of each tenant that was seen."""
        waiting = {tenant: load.requests for tenant, load in self._waiting.tenants.items()}
        return self._running.tally.figures(waiting)

    def note_refused(self, tenant: str) -> None:
        """A request of this tenant was refused, here or before it came here."""
        self._running.tally.refuse(tenant)

    @property
    def running(self) -> Running:
        """To be looked at only."""
        return self._running

    @property
    def waiting(self) -> Waiting:
        """To be looked at only."""
        return self._waiting

    def snapshot(self) -> list[str]:
        """What runs and waits, in words and without anybody's text."""
        return snapshot(self._running, self._waiting)

    def check(self) -> None:
        """Raises CoreInvariantError with what is wrong. Slow; for tests and debugging, after any event."""
        in_order = self._guard.name in ("fcfs", "priority") and not self._guard.errors
        requests, stop_ids = self._unfinished.requests, self._unfinished.stop_ids
        check_core(self.config, self._running, self._waiting, self._flights, requests, stop_ids, in_order)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _expect(self, result: StepResult) -> Flight:
        if not self._flights:
            raise ProtocolError(f"a result of step {result.step}, and no step is in flight")
        flight = self._flights[0]
        if result.step != flight.step:
            raise ProtocolError(f"a result of step {result.step} where step {flight.step} is next")
        return flight

    def _in_flight_requests(self) -> list[Request]:
        """Whose work the engine had when it died, in a fixed order."""
        sequences = (sequence for flight in self._flights for sequence in self._results.owners(flight).values())
        return list(dict.fromkeys(sequence.request for sequence in sequences))


def _unreachable(request: Request, now: float) -> str:
    left = (request.deadline or now) - now
    return f"{left:.3g} s are left until the deadline, and this request takes longer even if it begins now, alone"


def _measured(config: CoreConfig) -> StepCosts:
    """What is known of costs before the first step."""
    return StepCosts(block_out=config.swap_out_seconds, block_in=config.swap_in_seconds)
