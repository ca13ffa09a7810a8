"""The scheduler service: the sans-IO core, an engine group, and the asyncio between them.

One step's way: `core.plan` → encode once → the same bytes to every rank → results of all ranks → digests agree →
`core.apply` → the next plan is sent → deltas go to their sinks. Up to `pipeline_depth` steps are on their way at once.
A step with guided rows gets its masks by a message of their own, when the tokens before them are known (`guidance/`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import zmq

from treadle.errors import (
    EngineFailed,
    EngineStartFailed,
    InvalidRequest,
    ModelError,
    ProtocolError,
    RequestFailed,
    ServiceClosed,
    TreadleError,
)
from treadle.transport.codec import Digest, engine_codec
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.messages import (
    PROTOCOL_VERSION,
    Abort,
    Configure,
    Delta,
    Guided,
    Health,
    InfoRequest,
    ServerInfo,
    ServiceMessage,
    Stats,
    StepResult,
    Submit,
    TokenizerInfo,
)
from treadle.transport.params import check_params, check_submit

from .core import Core
from .delivery import Route, Sink, refusal
from .engine_group import Death, EngineGroup
from .guidance.guide import Guide
from .guidance.matching import Grammar, Matching
from .guidance.rows import MadeMasks
from .options import ModelFacts, ServiceOptions
from .request import Output, Outputs
from .request import Sequence as RequestSequence
from .setup import configure_message, core_config

logger = logging.getLogger("treadle")
_BACKOFF_SECONDS = (0.0, 0.5, 2.0, 5.0)


@dataclass(slots=True)
class _Flight:
    """A step on its way: when it was sent, its bytes, those of its masks where there are any, and who has answered."""

    step: int
    sent_at: float
    frame: bytes
    masks: bytes = b""
    results: dict[int, StepResult] = field(default_factory=dict)


class Service:
    """All methods run on the loop that called `start`. Requests come with the sink that their deltas go to."""

    def __init__(
        self,
        facts: ModelFacts,
        options: ServiceOptions,
        tokenizer_info: Callable[[], TokenizerInfo | None],
        leftovers: Sequence[Path] = (),
    ) -> None:
        self.facts = facts
        self.options = options
        self.incarnation = secrets.token_hex(8)
        self.bad_frames = 0
        self.failed = asyncio.Event()
        self._tokenizer_info = tokenizer_info
        self._leftovers = leftovers
        self._configure: Configure | None = None
        self._runtime: RuntimeDir | None = None
        self._core: Core | None = None
        self._group: EngineGroup | None = None
        self._groups = 0
        self._state = "starting"
        self._detail = ""
        self._flights: deque[_Flight] = deque()
        self._digest = Digest()
        self._codec = engine_codec()
        self._recoveries = 0
        self._failures_in_a_row = 0
        self._recovery: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._step_timer: asyncio.TimerHandle | None = None
        self._deadline_timer: asyncio.Handle | None = None
        self._deadline_at = 0.0
        self._steps = 0
        self._guide: Guide | None = None
        self._compiling: dict[tuple[Sink, str], asyncio.Task[None]] = {}

    # ── life ──

    async def start(self) -> None:
        """Starts the engine group and waits until it is ready. Raises ModelError, ConfigError, EngineStartFailed."""
        self._loop = asyncio.get_running_loop()
        self._runtime = RuntimeDir()
        try:
            self._configure = configure_message(self.facts, self.options, self._runtime.path)
            num_blocks = await self._start_group()
            # A later group must hold as many blocks as the core hands out, whatever is free by then.
            self._configure = msgspec.structs.replace(self._configure, num_blocks=num_blocks)
            config = core_config(self.facts, self.options, num_blocks, self._configure.max_model_len)
            self._core = Core(config, draw_seed=lambda: secrets.randbits(64))
        except BaseException:
            await self.close()
            raise
        self._state = "ready"

    async def close(self) -> None:
        """Stops the engines and removes every file; requests still open get no more deltas.

        Safe to call twice and at once: everybody waits for the same end.
        """
        self._state = "closed"
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for timer in (self._step_timer, self._deadline_timer):
            if timer is not None:
                timer.cancel()
        for task in self._compiling.values():
            task.cancel()
        if self._guide is not None:
            self._guide.close()
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        if self._group is not None:
            await self._group.stop(self.options.stop_timeout)
            self._group = None
        if self._runtime is not None:
            self._runtime.remove()

    @property
    def engine_pids(self) -> list[int]:
        return self._group.pids if self._group is not None else []

    # ── requests ──

    def submit(self, message: Submit, sink: Sink) -> None:
        """Accepts a request or raises its typed error; nothing else is disturbed by a bad one."""
        self._accepting()
        check_params(message.params, self.facts.vocab_size)
        check_submit(message)
        if message.id in sink.open:
            raise ProtocolError(f"request id {message.id!r} is in use")
        grammar = None
        if message.params.guided is not None:
            if self._guide is None:
                self._guide = Guide(self._matching, self.options.grammar_timeout)
            grammar = self._guide.cached(message.params.guided)
            if grammar is None:
                self._compile(self._guide, message.params.guided, message, sink)
                return
        self._enter(message, sink, grammar)

    def _enter(self, message: Submit, sink: Sink, grammar: Grammar | None) -> None:
        core = self._accepting()
        request = core.add(msgspec.structs.replace(message, id=f"{sink.name}/{message.id}"), self._loop.time())
        request.context = Route(sink, message.id)
        sink.open[message.id] = message.params.n
        if grammar is not None and self._guide is not None:
            self._guide.begin(request, grammar)
        self._pump()
        self._arm_timers()  # a deadline counts while the engines recover, too

    def abort(self, message: Abort, sink: Sink) -> None:
        compiling = self._compiling.get((sink, message.id))
        if compiling is not None:
            self._abort_compiling(compiling, message, sink)
        elif self._core is not None:
            self._deliver(self._core.abort(f"{sink.name}/{message.id}", self._loop.time(), message.index))
            self._pump()

    def detach(self, sink: Sink) -> None:
        """The receiver is gone: its requests end."""
        for request_id in list(sink.open):
            self.abort(Abort(request_id), sink)

    # ── guided requests ──

    def _matching(self) -> Matching:
        """On a thread, at the first guided request. Raises InvalidRequest."""
        try:
            from .guidance.llg import LlgMatching
        except ImportError as error:
            raise InvalidRequest("guided: this service has no llguidance; pip install 'treadle[guided]'") from error
        info = self._tokenizer_info()
        if info is None:
            raise InvalidRequest("guided: this model came without a tokenizer")
        return LlgMatching(info.tokenizer_json.decode(), self.facts.vocab_size, self.facts.eos_token_ids)

    def _compile(self, guide: Guide, guided: Guided, message: Submit, sink: Sink) -> None:
        """The request waits for its grammar, and for nobody else's turn."""
        sink.open[message.id] = message.params.n
        task = self._loop.create_task(self._enter_compiled(guide, guided, message, sink), name="treadle-grammar")
        self._compiling[sink, message.id] = task

    async def _enter_compiled(self, guide: Guide, guided: Guided, message: Submit, sink: Sink) -> None:
        """Whoever cancels this, `abort`, has seen to the rest."""
        try:
            grammar = await guide.compile(guided)
            del self._compiling[sink, message.id]
            self._enter(message, sink, grammar)
        except Exception as error:  # one request must not reach the others, whatever it did
            self._compiling.pop((sink, message.id), None)
            if not isinstance(error, TreadleError):
                logger.exception("a grammar raised")
            sink.open.pop(message.id, None)
            sink.refuse(refusal(message.id, error))

    def _abort_compiling(self, task: asyncio.Task[None], message: Abort, sink: Sink) -> None:
        if message.index >= 0:  # of several: when they run
            task.add_done_callback(lambda _: self.abort(message, sink))
            return
        task.cancel()
        del self._compiling[sink, message.id]
        for index in range(sink.open.pop(message.id, 0)):
            sink.put(Delta(message.id, index, [], "abort"))
        sink.flush()

    def _guide_steps(self) -> None:
        """Has the masks made for which all tokens are there."""
        if self._core is None or self._guide is None:
            return
        for due in self._core.masks_due():
            self._guide.make_masks(due, partial(self._send_masks, self._groups))

    def _send_masks(self, group: int, made: MadeMasks) -> None:
        """The step is on its way already, and its ranks wait for this."""
        flight = next((f for f in self._flights if f.step == made.masks.step), None)
        if self._core is None or self._state == "closed":
            return
        if self._group is not None and flight is not None and self._state == "ready" and group == self._groups:
            flight.masks = self._codec.encode(made.masks)
            self._group.broadcast(flight.masks)
        for sequence, message in made.failed:
            text = f"guided: {message}"
            self._deliver(self._core.fail(sequence, RequestFailed.code, text, self._loop.time()))
        self._pump()

    def answer(self, request: InfoRequest) -> ServiceMessage:
        """What an InfoRequest asks for; a refusal while starting, since the answer is not known yet."""
        try:
            return self._answer(request)
        except TreadleError as error:
            return refusal(request.id, error)

    def _answer(self, request: InfoRequest) -> ServiceMessage:
        if request.kind == "stats":
            return msgspec.structs.replace(self.stats(), id=request.id)
        if request.kind == "health":
            return msgspec.structs.replace(self.health(), id=request.id)
        if request.kind == "server":
            return self._server_info(request.id)
        if request.kind == "tokenizer":
            info = self._tokenizer_info()
            if info is None:
                raise ModelError("this model came without a tokenizer: send token ids")
            return msgspec.structs.replace(info, id=request.id)
        raise InvalidRequest(f"kind {request.kind!r}: allowed are server, tokenizer, stats, health")

    def stats(self) -> Stats:
        if self._core is None:
            return Stats()
        return msgspec.structs.replace(
            self._core.stats(), step=self._steps, recoveries=self._recoveries, bad_frames=self.bad_frames
        )

    def health(self) -> Health:
        age = self._loop.time() - self._flights[0].sent_at if self._flights else 0.0
        return Health(state=self._state, detail=self._detail, step=self._steps, step_age=age)

    # ── the step ──

    def _pump(self) -> None:
        if self._core is None or self._group is None or self._state != "ready":
            return
        while (plan := self._core.plan(self._loop.time())) is not None:
            frame = self._codec.encode(plan)
            self._flights.append(_Flight(plan.step, self._loop.time(), frame))
            self._group.broadcast(frame)
            if self._state != "ready":
                return
        self._guide_steps()
        self._check_core()
        self._arm_timers()

    def _on_result(self, result: StepResult) -> None:
        if self._state != "ready":
            return
        flight = next((f for f in self._flights if f.step == result.step), None)
        if flight is None or result.rank in flight.results:
            self._on_death(Death(result.rank, result.step, ProtocolError(f"an answer to step {result.step}, unasked")))
            return
        flight.results[result.rank] = result
        while self._flights and len(self._flights[0].results) == self.options.tensor_parallel_size:
            self._finish(self._flights.popleft())

    def _finish(self, flight: _Flight) -> None:
        if self._core is None:
            return
        result = flight.results[0]
        self._digest.add(flight.frame)
        self._digest.add(flight.masks)
        digest = self._digest.add(result.tokens)
        for rank, answer in flight.results.items():
            if answer.digest != digest:
                self._on_death(Death(rank, flight.step, EngineFailed(f"rank {rank} disagrees at step {flight.step}")))
                return
        try:
            outputs = self._core.apply(result, self._loop.time())
        except ProtocolError as error:
            self._on_death(Death(0, flight.step, error))
            return
        self._steps += 1
        self._failures_in_a_row = 0
        self._guide_steps()  # first of all: the ranks wait for these
        self._pump()  # the engines first, the readers after
        self._deliver_step(outputs)

    def _check_core(self) -> None:
        if self.options.debug and self._core is not None:
            self._core.check()

    # ── delivery ──

    def _deliver_step(self, outputs: Outputs) -> None:
        dirty: dict[Sink, None] = {}
        for sequence, token in zip(outputs.sequences, outputs.tokens, strict=True):
            route = _route(sequence)
            route.sink.put(Delta(route.request_id, sequence.index, [token]))
            dirty[route.sink] = None
        self._deliver(outputs.others, dirty)

    def _deliver(self, outputs: Iterable[Output], dirty: dict[Sink, None] | None = None) -> None:
        dirty = {} if dirty is None else dirty
        for output in outputs:
            route = _route(output.sequence)
            route.sink.put(_delta(output, route.request_id))
            dirty[route.sink] = None
            if output.finish:
                route.sink.count_down(route.request_id)
                if self._guide is not None:
                    self._guide.forget(output.sequence)
        for sink in dirty:
            sink.flush()

    # ── failure and recovery ──

    def _on_death(self, death: Death) -> None:
        if self._state != "ready":
            return
        step = death.step if death.step >= 0 or not self._flights else self._flights[0].step
        doing = f"at step {step}" if step >= 0 else "between steps"
        logger.error("engine group lost: rank %d, %s: %s", death.rank, doing, death.error)
        self._state, self._detail = "recovering", str(death.error)
        self._recovery = self._loop.create_task(self._recover(death), name="treadle-recovery")

    async def _recover(self, death: Death) -> None:
        """Tears the group down and starts another; what was committed is prefilled again (D7)."""
        try:
            self._forget_group()
            if self._group is not None:
                await self._group.kill()
                self._group = None
            error = await self._restart(death.error)
        except Exception as unforeseen:  # whatever it is, nobody may be left waiting for ever
            logger.exception("recovery failed")
            error = unforeseen
        if error is not None:
            self._give_up(error)

    def _forget_group(self) -> None:
        self._flights.clear()
        self._digest = Digest()
        if self._core is not None:
            self._deliver(self._core.reset(self._loop.time()))

    async def _restart(self, error: Exception) -> Exception | None:
        """None when a new group is ready, else why the last attempt failed."""
        while self._failures_in_a_row < self.options.max_restarts:
            backoff = _BACKOFF_SECONDS[min(self._failures_in_a_row, len(_BACKOFF_SECONDS) - 1)]
            self._failures_in_a_row += 1
            await asyncio.sleep(backoff)
            try:
                await self._start_group()
            except TreadleError as failed:
                logger.error("engine group did not start: %s", failed)
                error = failed
                continue
            self._recoveries += 1
            self._state, self._detail = "ready", ""
            logger.warning("engine group %d is ready", self._groups)
            self._pump()
            return None
        return error

    def _give_up(self, error: Exception) -> None:
        self._state, self._detail = "failed", f"gave up after {self._failures_in_a_row} restarts: {error}"
        logger.error("%s", self._detail)
        self.failed.set()
        if self._core is not None:
            self._deliver(self._core.fail_all(EngineFailed.code, self._detail, self._loop.time()))

    async def _start_group(self) -> int:
        """Starts a group and returns its number of blocks. Raises TreadleError."""
        if self._configure is None or self._runtime is None:
            raise ServiceClosed("the service is not started")
        self._groups += 1
        number = self._groups
        shared = self._runtime.path / f"shared-{number}"
        configure = msgspec.structs.replace(
            self._configure, shared_dir=str(shared), init_method=f"file://{shared / 'rendezvous'}"
        )
        group = None
        try:
            shared.mkdir(mode=0o700)
            group = EngineGroup(number, configure, self._runtime, self._leftovers, self._on_result, self._on_death)
            self._group = group
            ready = await group.start(self.options.start_timeout)
            if group.death is not None:
                raise group.death.error
        except BaseException as error:
            self._group = None
            if group is not None:
                await group.kill()
            if isinstance(error, OSError | zmq.ZMQError):  # no process, descriptor or socket to be had
                raise EngineStartFailed(f"the engine group could not be started: {error}") from error
            raise
        return ready[0].num_blocks

    # ── timers ──

    def _arm_timers(self) -> None:
        if self._step_timer is None and self._flights:
            due = self._flights[0].sent_at + self.options.step_timeout
            self._step_timer = self._loop.call_at(due, self._step_due)
        if self._core is None:
            return
        deadline = self._core.next_deadline()
        if deadline is None or (self._deadline_timer is not None and self._deadline_at <= deadline):
            return  # a timer that comes too early finds nothing to do and sets the next
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        self._deadline_at = max(deadline, self._loop.time())
        self._deadline_timer = self._loop.call_at(self._deadline_at, self._deadline_due)

    def _step_due(self) -> None:
        self._step_timer = None
        if not self._flights or self._state != "ready":
            return
        oldest = self._flights[0]
        if self._loop.time() < oldest.sent_at + self.options.step_timeout:
            self._arm_timers()
            return
        missing = [rank for rank in range(self.options.tensor_parallel_size) if rank not in oldest.results]
        text = (
            f"engine ranks {missing} did not finish step {oldest.step} within {self.options.step_timeout:g} s; where "
            "steps take longer, give them more with step_timeout (--step-timeout)"
        )
        self._on_death(Death(missing[0] if missing else -1, oldest.step, EngineFailed(text)))

    def _deadline_due(self) -> None:
        self._deadline_timer = None
        if self._core is not None:
            self._deliver(self._core.expire(self._loop.time()))
            self._pump()
            self._arm_timers()

    # ── inside ──

    def _accepting(self) -> Core:
        if self._core is None or self._state in ("failed", "closed", "starting"):
            raise ServiceClosed(f"the service is {self._state}: {self._detail}".rstrip(": "))
        return self._core

    def _server_info(self, request_id: str) -> ServerInfo:
        if self._core is None:
            raise ServiceClosed(f"the service is {self._state}")
        return ServerInfo(
            id=request_id,
            version=PROTOCOL_VERSION,
            incarnation=self.incarnation,
            model=self.facts.name,
            max_model_len=self._configure.max_model_len if self._configure is not None else 0,
            vocab_size=self.facts.vocab_size,
            world_size=self.options.tensor_parallel_size,
        )


def _route(sequence: RequestSequence) -> Route:
    return cast(Route, sequence.request.context)  # `submit` put it there


def _delta(output: Output, request_id: str) -> Delta:
    return Delta(
        request_id,
        output.sequence.index,
        output.tokens,
        output.finish,
        output.stop_token,
        output.cached_tokens,
        output.logprobs,
        output.prompt_logprobs,
        output.error_code,
        output.error,
    )
