"""The scheduler service: the sans-IO core, an engine group, and the asyncio between them.

One step's way: `core.plan` → encode once → the same bytes to every rank → results of all ranks → digests agree →
`core.apply` → the next plan is sent → deltas go to their sinks. Up to `pipeline_depth` steps are on their way at once.
A step with guided rows gets its masks by a message of their own, when the tokens before them are known (`guidance/`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import msgspec

from treadle.errors import (
    EngineFailed,
    InvalidRequest,
    ModelError,
    Overloaded,
    ProtocolError,
    RequestFailed,
    ServiceClosed,
    ServiceDraining,
    ServiceStarting,
    TreadleError,
)
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.messages import (
    Abort,
    Configure,
    Health,
    InfoRequest,
    Live,
    Masks,
    ServiceMessage,
    ServiceMetrics,
    Stats,
    StepResult,
    Submit,
    Timeline,
    TokenizerInfo,
)
from treadle.transport.params import check_params, check_submit

from .answers import delta, server_info
from .config import CoreConfig
from .core import Core
from .deadline import StepDeadline
from .delivery import Route, Sink, put_tokens, refusal, route_of
from .engine_group import ENGINE_COMMAND, Death, EngineGroup
from .event_log import EventWriter
from .guidance.desk import GuidedRequests, make_matching
from .guidance.matching import Grammar
from .health import judge
from .keeping import Keeping
from .lifecycle import GaveUp, ServiceEvent
from .live import LiveDesk, Sights
from .options import ModelFacts, ServiceOptions
from .pipeline import Pipeline
from .policies import Policy
from .policies.trouble import PolicyLog, in_words
from .recording import RecordedCore
from .recovery import Recovery
from .request import Output, Outputs
from .request_trace import begin_trace
from .setup import check_same_shape, configure_message, core_config
from .step import Step
from .supervisor import Supervisor
from .telemetry import Telemetry
from .timeline import MOST_SECONDS, Recorder
from .tracing.exporter import TraceExporter
from .tracing.start import start_tracing
from .watchdog import Dumps, Section, own_stacks

logger = logging.getLogger("treadle")
_ORPHAN_SECONDS = 120.0


class Service:
    """All methods run on the loop that called `start`. Requests come with the sink that their deltas go to.

    policy: of this service alone, instead of the one that the options name.
    on_event: told of every engine group that is lost or becomes ready, on the loop. engine_command: starts a rank.
    """

    def __init__(
        self,
        facts: ModelFacts,
        options: ServiceOptions,
        tokenizer_info: Callable[[], TokenizerInfo | None],
        leftovers: Sequence[Path] = (),
        policy: Policy | None = None,
        *,
        on_event: Callable[[ServiceEvent], None] | None = None,
        engine_command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.facts = facts
        self.options = options
        self.incarnation = secrets.token_hex(8)
        self.bad_frames = 0
        self.telemetry = Telemetry()
        self.failed = asyncio.Event()
        self._tokenizer_info = tokenizer_info
        self._on_event = on_event
        self._leftovers = leftovers
        self._policy = policy
        self._policy_log = PolicyLog()
        self._engine_command = engine_command
        self._runtime: RuntimeDir | None = None
        self._core: Core | RecordedCore | None = None
        self._event_log: EventWriter | None = None
        self._supervisor: Supervisor | None = None
        self._state = "starting"
        self._detail = ""
        self._pipeline = Pipeline(
            options.tensor_parallel_size,
            StepDeadline(options.step_timeout_floor, options.step_timeout),
            lambda: self._state == "ready",
            self.dump,
            self._on_death,
        )
        self._dumps = Dumps(options.dump_dir)
        self._live = LiveDesk()
        self._recovery = Recovery(self._note_event, self._forget_steps, self._resume, self._give_up)
        self._keeping: Keeping | None = None
        self._traces: TraceExporter | None = None
        self._recorder: Recorder | None = None
        self._orphan_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._paused = False
        self._changing = False
        self._landed = asyncio.Event()
        self._idle = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._deadline_timer: asyncio.Handle | None = None
        self._deadline_at = 0.0
        self._guided = GuidedRequests(
            lambda: make_matching(tokenizer_info, self.facts),
            options.grammar_timeout,
            options.max_waiting_requests,
            enter=self._enter,
            abort=self.abort,
            broadcast=self._send_masks,
            fail=self._fail,
            pump=self._pump,
            idle=self._note_idle,
            refused=self.note_refused,
        )

    # ── life ──

    async def start(self) -> None:
        """Starts the engine group and waits until it is ready. Raises ModelError, ConfigError, EngineStartFailed."""
        self._loop = asyncio.get_running_loop()
        self._runtime = RuntimeDir()
        try:
            self._traces = start_tracing(self.options.otlp_traces_endpoint, self.facts.name)
            if self.options.event_log:
                self._event_log = EventWriter(Path(self.options.event_log))
            configure = configure_message(self.facts, self.options, self._runtime.path)
            self._supervisor = self._make_supervisor(configure, self._runtime)
            held = await self._supervisor.start()
            self._core = self._make_core(core_config(self.facts, self.options, held, configure.max_model_len))
            await self._take_up_journal(self._core)
        except BaseException:
            await self.close()
            raise
        self._state = "ready"
        self._pump()

    def _make_supervisor(self, configure: Configure, runtime: RuntimeDir) -> Supervisor:
        return Supervisor(
            configure,
            runtime,
            self.options,
            self._engine_command,
            self._leftovers,
            self._on_result,
            self._on_death,
            self._recovery.tell,
        )

    async def close(self) -> None:
        """Stops the engines and removes every file; requests still open get no more deltas.

        Safe to call twice and at once: everybody waits for the same end.
        """
        self._state = "closed"
        if self._closing is None:
            self._guided.close()
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._pipeline.unwatch()
        for timer in (self._deadline_timer, self._orphan_timer):
            if timer is not None:
                timer.cancel()
        await self._recovery.cancel()
        await self._dumps.wait()
        if self._supervisor is not None:
            await self._supervisor.close()
        if self._event_log is not None:
            self._event_log.close()
        if self._keeping is not None:
            await self._keeping.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
        if self._runtime is not None:
            self._runtime.remove()

    def _make_core(self, config: CoreConfig) -> Core | RecordedCore:
        if self._event_log is not None:
            return RecordedCore(config, _draw_seed, self._event_log, self._policy)
        return Core(config, _draw_seed, self._policy)

    async def drain(self, grace: float) -> bool:
        """Takes nothing new and waits until everything has ended, at most `grace` seconds; whether it has.

        From now on `submit` raises ServiceDraining. What is unfinished then is handed back by whoever closes.
        """
        self._draining = True
        self._note("drain", f"{self.unfinished} requests are unfinished")
        logger.info("draining: %d requests are unfinished", self.unfinished)
        try:
            async with asyncio.timeout(grace):
                while self.unfinished and not self.failed.is_set():
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            logger.warning("draining: %d requests did not end within %g s", self.unfinished, grace)
        return not self.unfinished

    @property
    def unfinished(self) -> int:
        """Requests that were accepted and have not ended."""
        return self._guided.compiling + (self._core.unfinished if self._core is not None else 0)

    async def change_weights(self, facts: ModelFacts) -> None:
        """Goes on with other weights of the same shape: every request continues, from the tokens that it has.

        The new group is loaded beside the old one. Raises ConfigError for another shape, and whatever keeps the group
        from starting; the old one then goes on.
        """
        supervisor = self._supervisor
        if supervisor is None or self._core is None:
            raise ServiceClosed("the service is not ready for other weights")
        if self._changing:  # whichever group is adopted first ends the other
            raise InvalidRequest("other weights are being loaded already: ask again when they serve")
        check_same_shape(self.facts, facts)
        self._changing = True
        try:
            configure = msgspec.structs.replace(supervisor.configure, model=facts.path)
            await self._adopt(supervisor, await supervisor.make(configure), configure, facts)
        finally:
            self._changing = False

    async def _adopt(self, supervisor: Supervisor, group: EngineGroup, configure: Configure, facts: ModelFacts) -> None:
        self._paused = True
        try:
            await self._all_landed()
            self._forget_steps()
            await supervisor.adopt(group, configure)
            self.facts = facts
            self._note("reload", "other weights serve", facts.path)
        except BaseException:
            await supervisor.discard(group)
            raise
        finally:
            self._paused = False
            self._pump()

    async def _all_landed(self) -> None:
        """Waits until no step is in flight and a group serves. Raises ServiceClosed when none will."""
        while self._pipeline or self._state == "recovering":
            self._landed.clear()
            await self._landed.wait()
        if self._state != "ready":
            raise ServiceClosed(f"the service is {self._state}: {self._detail}")

    @property
    def _group(self) -> EngineGroup | None:
        return self._supervisor.group if self._supervisor is not None else None

    @property
    def engine_pids(self) -> list[int]:
        """Of the group that serves."""
        group = self._group
        return group.pids if group is not None else []

    @property
    def spare_pids(self) -> list[int]:
        """Of groups that stand by, load, or are being ended."""
        return self._supervisor.spare_pids if self._supervisor is not None else []

    @property
    def events(self) -> Sequence[ServiceEvent]:
        """The last things that happened to engine groups."""
        return self._recovery.events

    # ── requests ──

    def submit(self, message: Submit, sink: Sink) -> None:
        """Accepts a request or raises its typed error; nothing else is disturbed by a bad one."""
        try:
            self._submit(message, sink)
        except Exception as error:
            self.note_refused(message, error)
            raise

    def note_refused(self, message: Submit, error: Exception) -> None:
        """For statistics: a request came and was not accepted, by us or by whoever stands before us."""
        self.telemetry.note_refused(error)
        if isinstance(error, TreadleError):
            self._live.refused(error, asyncio.get_running_loop().time())
        if self._core is not None:
            self._core.note_refused(message.tenant)

    def _submit(self, message: Submit, sink: Sink) -> None:
        self._accepting()
        check_params(message.params, self.facts.vocab_size)
        check_submit(message)
        if message.id in sink.open:
            raise ProtocolError(f"request id {message.id!r} is in use")
        name = f"{sink.name}/{message.id}"
        if self._keeping is not None and self._keeping.claim(message, sink, name):
            return
        if message.params.guided is not None:
            self._guided.submit(message.params.guided, message, sink)
        else:
            self._enter(message, sink)

    def _enter(self, message: Submit, sink: Sink, grammar: Grammar | None = None) -> None:
        core = self._living()
        request = core.add(msgspec.structs.replace(message, id=f"{sink.name}/{message.id}"), self._loop.time())
        number = self._keeping.accept(message) if self._keeping is not None and request.unfinished else -1
        arrived = perf_counter()
        trace = begin_trace(message, arrived, request.unfinished) if self._traces is not None else None
        request.context = Route(sink, message.id, number, arrived, trace)
        self.telemetry.lives.entered(request)
        sink.open[message.id] = request.unfinished
        if grammar is not None:
            self._guided.begin(request, grammar)
        self._pump()
        self._arm_timers()  # a deadline counts while the engines recover, too

    def abort(self, message: Abort, sink: Sink) -> None:
        if self._guided.abort(message, sink):
            return
        name = f"{sink.name}/{message.id}"
        self._abort(self._keeping.name(name) if self._keeping is not None else name, message.index)

    def _abort(self, name: str, index: int) -> None:
        if self._core is not None:
            self._deliver(self._core.abort(name, self._loop.time(), index))
            self._pump()

    def _fail(self, name: str, index: int, message: str) -> None:
        if self._core is not None:
            self._deliver(self._core.fail(name, index, RequestFailed.code, message, self._loop.time()))

    async def _take_up_journal(self, core: Core | RecordedCore) -> None:
        """What the service before this one had accepted goes on; for a while without its readers."""
        if not self.options.journal:
            return
        self._keeping = await Keeping.open(self.options.journal, self.options.journal_sync, self._abort)
        if taken := self._keeping.take_up(core, self._loop.time()):
            logger.warning("%d requests of the journal go on", len(taken))
            self._orphan_timer = self._loop.call_later(_ORPHAN_SECONDS, self._keeping.drop_orphans)
        await self._guided.take_up(taken)

    def detach(self, sink: Sink) -> None:
        """The receiver is gone: its requests end."""
        for request_id in list(sink.open):
            self.abort(Abort(request_id), sink)

    def _make_masks(self) -> None:
        if self._core is not None:
            self._guided.make_masks(self._core, self._group)

    def _send_masks(self, group: EngineGroup | None, masks: Masks) -> None:
        """To the ranks of the step, if it is still on its way. group: that they were made for."""
        step = self._pipeline.find(masks.step)
        if group is not None and group is self._group and step is not None and self._state == "ready":
            group.broadcast(self._pipeline.mask(step, masks))

    # ── what it says of itself ──

    def answer(self, request: InfoRequest) -> ServiceMessage:
        """What an InfoRequest asks for; a refusal while starting, since the answer is not known yet."""
        try:
            return self._answer(request)
        except TreadleError as error:
            return refusal(request.id, error)

    def _answer(self, request: InfoRequest) -> ServiceMessage:
        if request.kind == "stats":
            return msgspec.structs.replace(self.stats(), id=request.id)
        if request.kind == "metrics":
            return msgspec.structs.replace(self.metrics(), id=request.id)
        if request.kind == "health":
            return msgspec.structs.replace(self.health(), id=request.id)
        if request.kind == "live":
            return msgspec.structs.replace(self.live(), id=request.id)
        if request.kind == "server":
            return server_info(request.id, self.incarnation, self.facts, self.options, self._core)
        if request.kind == "tokenizer":
            info = self._tokenizer_info()
            if info is None:
                raise ModelError("this model came without a tokenizer: send token ids")
            return msgspec.structs.replace(info, id=request.id)
        raise InvalidRequest(f"kind {request.kind!r}: allowed are server, tokenizer, stats, metrics, health, live")

    def stats(self) -> Stats:
        if self._core is None:
            return Stats()
        steps, recoveries = self._pipeline.finished, self._recovery.count
        return msgspec.structs.replace(
            self._core.stats(), step=steps, recoveries=recoveries, bad_frames=self.bad_frames
        )

    def metrics(self) -> ServiceMetrics:
        """What is counted beside `stats`."""
        tenants = self._core.tenants() if self._core is not None else []
        traces = self._traces
        outcomes = {"exported": traces.exported, "dropped": traces.dropped} if traces is not None else {}
        return self.telemetry.metrics(tenants, outcomes)

    def health(self) -> Health:
        """Judged by progress. Who is stuck or degraded says which rank, at which step, doing what, for how long."""
        oldest, recovery = self._pipeline.oldest, self._recovery
        missing = self._pipeline.missing(oldest) if oldest is not None else []
        state, detail, core, steps = self._state, self._detail, self._core, self._pipeline.finished
        if not detail and core is not None:
            detail = in_words(core.policy_errors, core.policy_error)
        if state == "ready" and self._draining:
            state, detail = "draining", f"{self.unfinished} requests are unfinished"
        now = self._loop.time()
        return judge(state, detail, steps, oldest, missing, recovery.lost, recovery.lost_at, self._supervisor, now)

    async def record(self, seconds: float) -> Timeline:
        """What happens in the next seconds. Raises InvalidRequest, and Overloaded while somebody else records."""
        self._living()
        if not 0 < seconds <= MOST_SECONDS:
            raise InvalidRequest(f"seconds={seconds!r}: allowed is above 0 and up to {MOST_SECONDS:g}")
        if self._recorder is not None:
            raise Overloaded("somebody else records this service; try again later", seconds)
        recorder = self._recorder = Recorder(perf_counter(), self.telemetry.lives.rows)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._recorder = None
        return recorder.timeline(perf_counter())

    def live(self) -> Live:
        """What it does now, row by row and rank by rank; a picture at most 0.2 s old."""
        return self._live.look(self._sights, self._loop.time())

    def _sights(self) -> Sights:
        return Sights(
            self.incarnation,
            self.facts.name,
            self.options.max_num_seqs,
            self.options.tensor_parallel_size,
            self.stats(),
            self.health(),
            self._core,
            self._pipeline,
            self.engine_pids,
        )

    def _note(self, kind: str, text: str, detail: str = "") -> None:
        self._live.note(kind, text, detail, asyncio.get_running_loop().time())

    def dump(self, reason: str) -> asyncio.Task[None]:
        """Writes what everybody is doing into one file, and its path into the log."""
        self._note("dump", reason)
        return self._dumps.leave(reason, self._sections)

    async def _sections(self) -> list[Section]:
        group, recent = self._group, list(self._pipeline.recent)
        sections: list[Section] = [  # lists, made now: another thread writes them, while steps go on
            ("health", [str(self.health())]),
            ("events", list(map(str, self.events))),
            (f"last {len(recent)} steps", list(map(str, recent))),
            ("requests", self._core.snapshot() if self._core is not None else []),
            ("scheduler", own_stacks()),
        ]
        if group is not None:
            sections.append((f"engine group {group.number}", await group.describe()))
        return sections

    # ── the step ──

    def _pump(self) -> None:
        group = self._group
        if self._core is None or group is None or self._state != "ready" or self._paused:
            return
        plan_at = perf_counter()
        while (plan := self._core.plan(now := self._loop.time())) is not None:
            started = self._core.started(plan) if plan.start else ()
            step = self._pipeline.send(plan)
            step.plan_at, step.ready_at = plan_at, perf_counter()
            group.broadcast(step.frame)
            step.out_at = plan_at = perf_counter()
            step.chunks = self.telemetry.lives.planned(plan, started, plan_at)
            if self._recorder is not None:
                self._recorder.sent(step, plan, started)
            self._live.planned(self._core, plan, now)
            if group.death is not None or self._state != "ready":
                return
        self._make_masks()
        self._check_core()
        if self._core.policy_errors != self._policy_log.told:
            self._policy_log.tell(self._core.policy_errors, self._core.policy_error, self._loop.time())
        self._arm_timers()

    def _on_result(self, result: StepResult) -> None:
        if self._state != "ready":
            return
        try:
            self._pipeline.answer(result)
        except ProtocolError as error:
            self._on_death(Death(result.rank, result.step, "malformed", error))
            return
        while (step := self._pipeline.take()) is not None:
            self._finish(step)

    def _finish(self, step: Step) -> None:
        if self._core is None:
            return
        rank = self._pipeline.disagreeing(step)
        if rank is not None:
            error = EngineFailed(f"rank {rank} disagrees at step {step.number}")
            self._on_death(Death(rank, step.number, "disagreed", error), step)
            return
        now, step.back_at = self._loop.time(), perf_counter()
        seconds = self._pipeline.lasted(step, now)
        try:
            outputs = self._core.apply(step.results[0], now, seconds)
        except ProtocolError as malformed:
            self._on_death(Death(0, step.number, "malformed", malformed), step)
            return
        step.applied_at = perf_counter()
        self._live.applied(self._core, now)
        self._note_progress(step)
        self._make_masks()  # first of all: the ranks wait for these
        self._pump()  # the engines first, the readers after
        step.deliver_at = perf_counter()
        self.telemetry.lives.landed(step)
        self._deliver_step(outputs)
        step.delivered_at = perf_counter()
        self.telemetry.note(step)
        if self._recorder is not None:
            self._recorder.landed(step)

    def _note_progress(self, step: Step) -> None:
        self._pipeline.finish(step)
        if not self._pipeline:
            self._landed.set()
        if self._supervisor is not None:
            self._supervisor.attempts = 0

    def _check_core(self) -> None:
        if self.options.debug and self._core is not None:
            self._core.check()

    # ── delivery ──

    def _deliver_step(self, outputs: Outputs) -> None:
        if self._keeping is not None:
            self._keeping.note_step(outputs)
        self._deliver(outputs.others, put_tokens(outputs))

    def _deliver(self, outputs: Sequence[Output], dirty: dict[Sink, None] | None = None) -> None:
        dirty = {} if dirty is None else dirty
        if self._keeping is not None:
            self._keeping.note(outputs)
        for output in outputs:
            route = route_of(output.sequence)
            route.sink.put(delta(output, route.request_id))
            dirty[route.sink] = None
            if output.finish:
                trace = self.telemetry.lives.ended(output, perf_counter())
                if trace is not None and self._traces is not None:
                    self._traces.put(trace)
                if self._recorder is not None:
                    self._recorder.ended(output, perf_counter())
                route.sink.count_down(route.request_id)
                self._guided.forget(output.sequence)
                self._live.ended(output, self._loop.time())
        for sink in dirty:
            sink.flush()
        self._note_idle()

    def _note_idle(self) -> None:
        if not self.unfinished:
            self._idle.set()

    # ── failure and recovery ──

    def _on_death(self, death: Death, step: Step | None = None) -> None:
        """The serving group is lost. step: the one in question, where it has landed already."""
        if self._state != "ready" or self._supervisor is None or self._supervisor.group is None:
            return
        self._state, self._detail = "recovering", str(death.error)
        step = step or self._pipeline.find(death.step) or self._pipeline.oldest
        self._recovery.begin(self._supervisor, self._supervisor.group.number, death, step)

    def _forget_steps(self) -> None:
        self._pipeline.forget()
        if self._core is not None:
            outputs = self._core.reset(self._loop.time())
            self.telemetry.lives.lost(perf_counter())
            if self._recorder is not None:
                self._recorder.lost(perf_counter())
            self._deliver(outputs)

    def _resume(self) -> None:
        """Another group serves."""
        self._state, self._detail = "ready", ""
        self._landed.set()
        self._pump()

    def _give_up(self, event: GaveUp) -> None:
        self._state, self._detail = "failed", str(event)
        self._recovery.tell(event)
        self.failed.set()
        self._landed.set()
        self._idle.set()
        if self._core is not None:
            self._deliver(self._core.fail_all(EngineFailed.code, self._detail, self._loop.time()))

    def _note_event(self, event: ServiceEvent) -> None:
        self.telemetry.note_event(event)
        self._live.event(event, self._loop.time())
        if self._on_event is not None:
            self._on_event(event)

    # ── timers ──

    def _arm_timers(self) -> None:
        self._pipeline.watch()
        if self._core is None:
            return
        deadline = self._core.next_deadline()
        if deadline is None or (self._deadline_timer is not None and self._deadline_at <= deadline):
            return  # a timer that comes too early finds nothing to do and sets the next
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        self._deadline_at = max(deadline, self._loop.time())
        self._deadline_timer = self._loop.call_at(self._deadline_at, self._deadline_due)

    def _deadline_due(self) -> None:
        self._deadline_timer = None
        if self._core is not None:
            self._deliver(self._core.expire(self._loop.time()))
            self._pump()
            self._arm_timers()

    # ── inside ──

    def _accepting(self) -> Core | RecordedCore:
        core = self._living()
        if self._draining:
            raise ServiceDraining("the service is draining: it finishes what it has and takes nothing new")
        return core

    def _living(self) -> Core | RecordedCore:
        if self._state == "starting":
            raise ServiceStarting("the service is starting")
        if self._core is None or self._state in ("failed", "closed"):
            raise ServiceClosed(f"the service is {self._state}: {self._detail}".rstrip(": "))
        return self._core


def _draw_seed() -> int:
    return secrets.randbits(64)
