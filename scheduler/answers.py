"""What a service says of itself to those who ask, and what it leaves behind when nothing moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from treadle.errors import InvalidRequest, ModelError, ServiceStarting, TreadleError
from treadle.transport.messages import (
    PROTOCOL_VERSION,
    Health,
    InfoRequest,
    Live,
    ServerInfo,
    ServiceMessage,
    ServiceMetrics,
    Stats,
    TokenizerInfo,
)

from .delivery import refusal
from .health import judge
from .live import Sights
from .observers import Observers
from .options import ServiceOptions
from .pipeline import Pipeline
from .policies.trouble import in_words
from .recovery import Recovery
from .standing import Standing
from .watchdog import Section, own_stacks


class Answers:
    """incarnation: of the service. unfinished: requests that were accepted and have not ended."""

    def __init__(
        self,
        incarnation: str,
        options: ServiceOptions,
        tokenizer_info: Callable[[], TokenizerInfo | None],
        standing: Standing,
        pipeline: Pipeline,
        recovery: Recovery,
        observers: Observers,
        unfinished: Callable[[], int],
    ) -> None:
        self._incarnation = incarnation
        self._options = options
        self._tokenizer_info = tokenizer_info
        self._standing = standing
        self._pipeline = pipeline
        self._recovery = recovery
        self._observers = observers
        self._unfinished = unfinished

    def answer(self, request: InfoRequest) -> ServiceMessage:
        """What it asks for; a refusal while starting, since the answer is not known yet."""
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
            return self._server(request.id)
        if request.kind == "tokenizer":
            info = self._tokenizer_info()
            if info is None:
                raise ModelError("this model came without a tokenizer: send token ids")
            return msgspec.structs.replace(info, id=request.id)
        raise InvalidRequest(f"kind {request.kind!r}: allowed are server, tokenizer, stats, metrics, health, live")

    def stats(self) -> Stats:
        core = self._standing.core
        if core is None:
            return Stats()
        return msgspec.structs.replace(
            core.stats(),
            step=self._pipeline.finished,
            recoveries=self._recovery.count,
            bad_frames=self._observers.telemetry.bad_frames,
        )

    def metrics(self) -> ServiceMetrics:
        """What is counted beside `stats`."""
        core = self._standing.core
        return self._observers.metrics(core.tenants() if core is not None else [])

    def health(self) -> Health:
        """Judged by progress. Who is stuck or degraded says which rank, at which step, doing what, for how long."""
        standing, oldest, recovery = self._standing, self._pipeline.oldest, self._recovery
        missing = self._pipeline.missing(oldest) if oldest is not None else []
        state, detail, core, steps = standing.state, standing.detail, standing.core, self._pipeline.finished
        if not detail and core is not None:
            detail = in_words(core.policy_errors, core.policy_error)
        if state == "ready" and standing.draining:
            state, detail = "draining", f"{self._unfinished()} requests are unfinished"
        now = asyncio.get_running_loop().time()
        return judge(state, detail, steps, oldest, missing, recovery.lost, recovery.lost_at, standing.supervisor, now)

    def live(self) -> Live:
        """What it does now, row by row and rank by rank; a picture at most 0.2 s old."""
        return self._observers.live.look(self._sights, asyncio.get_running_loop().time())

    async def sections(self) -> list[Section]:
        """Of a dump: what everybody is doing."""
        standing, recent = self._standing, list(self._pipeline.recent)
        group = standing.group
        sections: list[Section] = [  # lists, made now: another thread writes them, while steps go on
            ("health", [str(self.health())]),
            ("events", list(map(str, self._recovery.events))),
            (f"last {len(recent)} steps", list(map(str, recent))),
            ("requests", standing.core.snapshot() if standing.core is not None else []),
            ("scheduler", own_stacks()),
        ]
        if group is not None:
            sections.append((f"engine group {group.number}", await group.describe()))
        return sections

    def _server(self, request_id: str) -> ServerInfo:
        """Raises ServiceStarting: before the engines are ready the limits are not known."""
        facts, core = self._standing.facts, self._standing.core
        if core is None or self._standing.state == "starting":  # requests are not taken yet, either
            raise ServiceStarting("the service is starting")
        return ServerInfo(
            id=request_id,
            version=PROTOCOL_VERSION,
            incarnation=self._incarnation,
            model=facts.name,
            max_model_len=core.config.max_model_len,
            vocab_size=facts.vocab_size,
            world_size=self._options.tensor_parallel_size,
        )

    def _sights(self) -> Sights:
        group = self._standing.group
        return Sights(
            self._incarnation,
            self._standing.facts.name,
            self._options.max_num_seqs,
            self._options.tensor_parallel_size,
            self.stats(),
            self.health(),
            self._standing.core,
            self._pipeline,
            group.pids if group is not None else [],
        )
