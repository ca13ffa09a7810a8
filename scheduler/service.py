"""The scheduler service: the sans-IO core, an engine group, and the asyncio between them.

Here are its life, its requests, and what becomes of it when an engine group is lost. A step's way is in `step_loop.py`,
what comes of it in `outbox.py`, what it says of itself in `answers.py`, other weights in `reload.py`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import msgspec

from treadle.errors import EngineFailed, ProtocolError, ServiceClosed
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.messages import (
    Abort,
    Configure,
    Health,
    InfoRequest,
    Live,
    ServiceMessage,
    ServiceMetrics,
    Stats,
    Submit,
    Timeline,
    TokenizerInfo,
)
from treadle.transport.params import check_params, check_submit

from .answers import Answers
from .config import CoreConfig
from .core import Core
from .deadline import StepDeadline
from .delivery import Route, Sink
from .engine_group import ENGINE_COMMAND, Death
from .event_log import EventWriter
from .guidance.desk import GuidedRequests, make_matching
from .guidance.matching import Grammar
from .journal_file import check_mark
from .keeping import Keeping
from .lifecycle import GaveUp, ServiceEvent
from .observers import Observers
from .options import ModelFacts, ServiceOptions
from .outbox import Outbox
from .pipeline import Pipeline
from .policies import Policy
from .recording import RecordedCore
from .recovery import Recovery
from .reload import Reload
from .setup import configure_message, core_config
from .standing import Standing
from .step import Step
from .step_loop import StepLoop
from .supervisor import Supervisor
from .watchdog import Dumps, dump_directory
from .writable import check_directory, check_file

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
        self.options = options
        self.incarnation = secrets.token_hex(8)
        self.observers = Observers()
        self.failed = asyncio.Event()
        self._standing = Standing(facts)
        self._on_event = on_event
        self._leftovers = leftovers
        self._policy = policy
        self._engine_command = engine_command
        self._runtime: RuntimeDir | None = None
        self._event_log: EventWriter | None = None
        self._keeping: Keeping | None = None
        self._orphan_timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._dumps = Dumps(options.dump_dir)
        self._recovery = Recovery(self._note_event, self._forget_steps, self._resume, self._give_up)
        self._pipeline = Pipeline(
            options.tensor_parallel_size,
            StepDeadline(options.step_timeout_floor, options.step_timeout),
            lambda: self._standing.ready,
            self.dump,
            self._on_death,
        )
        self._outbox = Outbox(self.observers, lambda sequence: self._guided.forget(sequence), self._note_idle)
        self._steps = StepLoop(
            self._standing,
            self._pipeline,
            self.observers,
            self._outbox,
            debug=options.debug,
            make_masks=lambda core, group: self._guided.make_masks(core, group),
            on_death=self._on_death,
        )
        self._guided = self._make_guided(tokenizer_info)
        self._reload = Reload(self._standing, self._steps, self.observers)
        self._answers = Answers(
            self.incarnation,
            options,
            tokenizer_info,
            self._standing,
            self._pipeline,
            self._recovery,
            self.observers,
            lambda: self.unfinished,
        )

    def _make_guided(self, tokenizer_info: Callable[[], TokenizerInfo | None]) -> GuidedRequests:
        return GuidedRequests(
            lambda: make_matching(tokenizer_info, self.facts),
            self.options.grammar_timeout,
            self.options.max_waiting_requests + self.options.max_num_seqs,
            enter=self._enter,
            abort=self.abort,
            broadcast=self._steps.send_masks,
            fail=self._fail,
            pump=self._steps.pump,
            idle=self._note_idle,
            refused=self.note_refused,
        )

    # ── life ──

    async def start(self) -> None:
        """Starts the engine group and waits until it is ready.

        Raises ModelError, ConfigError, EngineStartFailed, and ServiceClosed when it is closed meanwhile.
        """
        self._check_open()
        self._loop = asyncio.get_running_loop()
        self._runtime = RuntimeDir()
        standing = self._standing
        try:
            self._check_files()
            self.observers.start(self.options.otlp_traces_endpoint, self.facts.name)
            if self.options.event_log:
                self._event_log = EventWriter(Path(self.options.event_log))
            configure = configure_message(self.facts, self.options, self._runtime.path)
            standing.supervisor = self._make_supervisor(configure, self._runtime)
            held = await standing.supervisor.start()
            self._check_open()
            standing.core = self._make_core(core_config(self.facts, self.options, held, configure.max_model_len))
            await self._take_up_journal(standing.core)
            self._check_open()
        except BaseException as error:
            await self.close()
            if isinstance(error, asyncio.CancelledError) and not _cancelled():
                self._check_open()  # it was the group's start that ended so, when somebody closed us
            raise
        standing.become("ready")
        group = standing.group
        if group is not None and group.death is not None:  # while the journal was read: it says so only once
            self._on_death(group.death)
        self._steps.pump()
        self._steps.arm_timers()

    def _check_files(self) -> None:
        """Those that are written later; the event log is opened at once. The default stops nobody."""
        if self.options.dump_dir:
            check_directory("dump_dir", dump_directory(self.options.dump_dir))
        if self.options.journal:
            check_file("journal", Path(self.options.journal))
            check_mark(Path(self.options.journal))

    def _check_open(self) -> None:
        if self._closing is not None:
            raise ServiceClosed("the service was closed while it started")

    def _make_supervisor(self, configure: Configure, runtime: RuntimeDir) -> Supervisor:
        return Supervisor(
            configure,
            runtime,
            self.options,
            self._engine_command,
            self._leftovers,
            self._steps.on_result,
            self._on_death,
            self._recovery.tell,
        )

    async def close(self) -> None:
        """Stops the engines and removes every file; requests still open get no more deltas.

        Safe to call twice and at once: everybody waits for the same end.
        """
        self._standing.state = "closed"
        if self._closing is None:
            self._guided.close()
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._steps.close()
        if self._orphan_timer is not None:
            self._orphan_timer.cancel()
        await self._recovery.cancel()
        await self._dumps.wait()
        if self._standing.supervisor is not None:
            await self._standing.supervisor.close()
        if self._event_log is not None:
            self._event_log.close()
        if self._keeping is not None:
            await self._keeping.close()
        await self.observers.close()
        if self._runtime is not None:
            self._runtime.remove()

    def _make_core(self, config: CoreConfig) -> Core | RecordedCore:
        if self._event_log is not None:
            return RecordedCore(config, _draw_seed, self._event_log, self._policy)
        return Core(config, _draw_seed, self._policy)

    async def _take_up_journal(self, core: Core | RecordedCore) -> None:
        """What the service before this one had accepted goes on; for a while without its readers."""
        if not self.options.journal:
            return
        self._standing.become("starting", f"reading the journal {self.options.journal}")
        keeping = await Keeping.open(self.options.journal, self.options.journal_sync, self._abort)
        if self._closing is not None:  # it did not know of this one
            await keeping.close()
        self._check_open()
        self._keeping = self._outbox.keeping = keeping
        if taken := self._keeping.take_up(core, self._loop.time()):
            logger.warning("%d requests of the journal go on", len(taken))
            self._orphan_timer = self._loop.call_later(_ORPHAN_SECONDS, self._keeping.drop_orphans)
        await self._guided.take_up(taken, _ORPHAN_SECONDS / 2)  # the other half is for those who come back

    async def drain(self, grace: float) -> bool:
        """Takes nothing new and waits until everything has ended, at most `grace` seconds; whether it has.

        From now on `submit` raises ServiceDraining. What is unfinished then is handed back by whoever closes.
        """
        self._standing.draining = True
        self.observers.note("drain", f"{self.unfinished} requests are unfinished")
        logger.info("draining: %d requests are unfinished", self.unfinished)
        try:
            async with asyncio.timeout(grace):
                while self.unfinished and not self.failed.is_set():
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            logger.warning("draining: %d requests did not end within %g s", self.unfinished, grace)
        return not self.unfinished

    def _note_idle(self) -> None:
        if not self.unfinished:
            self._idle.set()

    async def change_weights(self, facts: ModelFacts) -> None:
        """Goes on with other weights of the same shape: every request continues, from the tokens that it has.

        Raises ConfigError for another shape, and whatever keeps the new group from starting; the old one then goes on.
        """
        await self._reload.change(facts)

    @property
    def facts(self) -> ModelFacts:
        """Of the weights that serve."""
        return self._standing.facts

    @property
    def unfinished(self) -> int:
        """Requests that were accepted and have not ended."""
        core = self._standing.core
        return self._guided.compiling + (core.unfinished if core is not None else 0)

    @property
    def engine_pids(self) -> list[int]:
        """Of the group that serves."""
        group = self._standing.group
        return group.pids if group is not None else []

    @property
    def spare_pids(self) -> list[int]:
        """Of groups that stand by, load, or are being ended."""
        supervisor = self._standing.supervisor
        return supervisor.spare_pids if supervisor is not None else []

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
        self.observers.refused(error, asyncio.get_running_loop().time())
        if self._standing.core is not None:
            self._standing.core.note_refused(message.tenant)

    def _submit(self, message: Submit, sink: Sink) -> None:
        self._standing.accepting()
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
        core = self._standing.living()
        request = core.add(msgspec.structs.replace(message, id=f"{sink.name}/{message.id}"), self._loop.time())
        number = self._keeping.accept(message) if self._keeping is not None and request.unfinished else -1
        arrived = perf_counter()
        trace = self.observers.trace(message, arrived, request.unfinished)
        request.context = Route(sink, message.id, number, arrived, trace)
        self.observers.entered(request)
        sink.open[message.id] = request.unfinished
        if grammar is not None:
            self._guided.begin(request, grammar)
        self._steps.pump()
        self._steps.arm_timers()  # a deadline counts while the engines recover, too

    def abort(self, message: Abort, sink: Sink) -> None:
        if self._guided.abort(message, sink):
            return
        name = f"{sink.name}/{message.id}"
        self._abort(self._keeping.name(name) if self._keeping is not None else name, message.index)

    def _abort(self, name: str, index: int) -> None:
        if self._standing.core is not None:
            self._outbox.deliver(self._standing.core.abort(name, self._loop.time(), index))
            self._steps.pump()

    def _fail(self, name: str, index: int, code: str, message: str) -> None:
        """Its grammar does not go on."""
        core = self._standing.core
        if core is not None:
            self._outbox.deliver(core.fail(name, index, code, message, self._loop.time()))

    def detach(self, sink: Sink) -> None:
        """The receiver is gone: its requests end."""
        for request_id in list(sink.open):
            self.abort(Abort(request_id), sink)

    # ── what it says of itself ──

    def answer(self, request: InfoRequest) -> ServiceMessage:
        """What an InfoRequest asks for; a refusal while starting, since the answer is not known yet."""
        return self._answers.answer(request)

    def stats(self) -> Stats:
        return self._answers.stats()

    def metrics(self) -> ServiceMetrics:
        """What is counted beside `stats`."""
        return self._answers.metrics()

    def health(self) -> Health:
        """Judged by progress. Who is stuck or degraded says which rank, at which step, doing what, for how long."""
        return self._answers.health()

    def live(self) -> Live:
        """What it does now, row by row and rank by rank; a picture at most 0.2 s old."""
        return self._answers.live()

    async def record(self, seconds: float) -> Timeline:
        """What happens in the next seconds. Raises InvalidRequest, and Overloaded while somebody else records."""
        self._standing.living()
        return await self.observers.record(seconds)

    def dump(self, reason: str) -> asyncio.Task[None]:
        """Writes what everybody is doing into one file, and its path into the log."""
        self.observers.note("dump", reason)
        return self._dumps.leave(reason, self._answers.sections)

    # ── failure and recovery ──

    def _on_death(self, death: Death, step: Step | None = None) -> None:
        """The serving group is lost. step: the one in question, where it has landed already."""
        standing = self._standing
        if not standing.ready or standing.supervisor is None or standing.supervisor.group is None:
            return
        standing.become("recovering", str(death.error))
        step = step or self._pipeline.find(death.step) or self._pipeline.oldest
        self._recovery.begin(standing.supervisor, standing.supervisor.group.number, death, step)

    def _forget_steps(self) -> None:
        self._steps.forget()

    def _resume(self) -> None:
        """Another group serves."""
        self._standing.become("ready")
        self._steps.look_again()
        self._steps.pump()

    def _give_up(self, event: GaveUp) -> None:
        self._standing.become("failed", str(event))
        self._recovery.tell(event)
        self.failed.set()
        self._steps.look_again()
        self._idle.set()
        core = self._standing.core
        if core is not None:
            self._outbox.deliver(core.fail_all(EngineFailed.code, str(event), self._loop.time()))

    def _note_event(self, event: ServiceEvent) -> None:
        self.observers.event(event, self._loop.time())
        if self._on_event is not None:
            self._on_event(event)


def _draw_seed() -> int:
    return secrets.randbits(64)


def _cancelled() -> bool:
    """Whether somebody asked for this task to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
