"""Guided requests of a service: each waits here for its grammar, and its steps for their masks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial

from treadle.errors import InvalidRequest, Overloaded, TreadleError
from treadle.scheduler.core import Core
from treadle.scheduler.delivery import Sink, refusal
from treadle.scheduler.engine_group import EngineGroup
from treadle.scheduler.options import ModelFacts
from treadle.scheduler.recording import RecordedCore
from treadle.scheduler.request import Request, Sequence
from treadle.transport.messages import Abort, Delta, Guided, Masks, Submit, TokenizerInfo

from .guide import AT_ONCE, Guide
from .matching import Grammar, Matching
from .rows import MadeMasks

logger = logging.getLogger("treadle")


class GuidedRequests:
    """Methods run on one loop, threads do the work (`Guide`). Nothing is made before the first guided request.

    make: see `Guide`. seconds: for compiling a grammar. most: requests that may wait for theirs. What it has the
    service do: enter: accept a request whose grammar is there, or raise. abort: one that has entered. broadcast: masks
    to the group that they were made for. fail: one continuation of a request, by its name in the core, the error's
    code, and why. pump: go on. idle: something has ended. refused: a request that was taken in is not accepted after
    all.
    """

    def __init__(
        self,
        make: Callable[[], Matching],
        seconds: float,
        most: int,
        *,
        enter: Callable[[Submit, Sink, Grammar], None],
        abort: Callable[[Abort, Sink], None],
        broadcast: Callable[[EngineGroup | None, Masks], None],
        fail: Callable[[str, int, str, str], None],
        pump: Callable[[], None],
        idle: Callable[[], None],
        refused: Callable[[Submit, Exception], None],
    ) -> None:
        self._make = make
        self._seconds = seconds
        self._most = most
        self._enter = enter
        self._abort = abort
        self._broadcast = broadcast
        self._fail = fail
        self._pump = pump
        self._idle = idle
        self._refused = refused
        self._guide: Guide | None = None
        self._compiling: dict[tuple[Sink, str], asyncio.Task[None]] = {}
        self._taking_up: asyncio.Future[list[None]] | None = None
        self._closed = False

    def close(self) -> None:
        """Nobody hears of what is being compiled or made."""
        self._closed = True
        for task in self._compiling.values():
            task.cancel()
        if self._taking_up is not None:
            self._taking_up.cancel()
        if self._guide is not None:
            self._guide.close()

    # ── requests ──

    @property
    def compiling(self) -> int:
        """Requests whose grammar is being compiled: accepted, and not in the core yet."""
        return len(self._compiling)

    def submit(self, guided: Guided, message: Submit, sink: Sink) -> None:
        """Enters at once where the grammar is known, and raises what `enter` raises; else waits for nobody's turn."""
        guide = self._own_guide()
        grammar = guide.cached(guided)
        if grammar is not None:
            self._enter(message, sink, grammar)
            return
        if len(self._compiling) >= self._most:
            raise Overloaded(f"{self._most} requests wait for their grammars, which is the limit")
        sink.open[message.id] = message.params.n
        task = asyncio.get_running_loop().create_task(
            self._enter_compiled(guide, guided, message, sink), name="treadle-grammar"
        )
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
            sink.forget(message.id)
            self._refused(message, error)
            sink.refuse(refusal(message.id, error))
            self._idle()

    async def take_up(self, requests: Iterable[Request], patience: float) -> None:
        """Those that were accepted by the service before this one: no step runs before their grammars are there.

        As many at once as are compiled at once, so that none is refused because it waits for the others. patience:
        seconds in which they come again where all is taken even so; after that they fail. It ends with CancelledError,
        and nobody fails, when this is closed.
        """
        until = asyncio.get_running_loop().time() + patience
        rest = iter([(request, guided) for request in requests if (guided := request.params.guided) is not None])

        async def work() -> None:
            for request, guided in rest:
                await self._take_up(request, guided, until)

        self._taking_up = asyncio.gather(*(work() for _ in range(AT_ONCE)))
        await self._taking_up

    async def _take_up(self, request: Request, guided: Guided, until: float) -> None:
        try:
            grammar = await self._compile_by(until, guided)
        except TreadleError as error:
            for index in range(request.params.n):
                self._fail(request.id, index, error.code, f"guided: {error}")
        else:
            self.begin(request, grammar)

    async def _compile_by(self, until: float, guided: Guided) -> Grammar:
        """Raises what `Guide.compile` does; Overloaded only when the time is over."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await self._own_guide().compile(guided)
            except Overloaded as error:
                left = until - loop.time()
                if left <= 0:
                    raise
                await asyncio.sleep(min(error.retry_after, left))

    def abort(self, message: Abort, sink: Sink) -> bool:
        """Whether the request was waiting for its grammar; then this is all that there is to do."""
        task = self._compiling.get((sink, message.id))
        if task is None:
            return False
        if message.index >= 0:  # of several: when they run
            task.add_done_callback(lambda _: self._abort(message, sink))
            return True
        task.cancel()
        del self._compiling[sink, message.id]
        for index in range(sink.forget(message.id)):
            sink.put(Delta(message.id, index, [], "abort"))
        sink.flush()
        self._idle()
        return True

    def begin(self, request: Request, grammar: Grammar) -> None:
        """The request is in the core; its sequences are guided until `forget`."""
        self._own_guide().begin(request, grammar)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. One that was never guided is no error."""
        if self._guide is not None:
            self._guide.forget(sequence)

    def _own_guide(self) -> Guide:
        if self._guide is None:
            self._guide = Guide(self._make, self._seconds)
        return self._guide

    # ── masks ──

    def make_masks(self, core: Core | RecordedCore, group: EngineGroup | None) -> None:
        """Has the masks made for which all tokens are there. group: that has the steps."""
        if self._guide is None:
            return
        pages = group.mask_pages if group is not None else None
        for due in core.masks_due():
            self._guide.make_masks(due, pages, partial(self._made, group))

    def _made(self, group: EngineGroup | None, made: MadeMasks) -> None:
        """The step is on its way already, and its ranks wait for this."""
        if self._closed:
            return
        self._broadcast(group, made.masks)
        for sequence, message in made.failed:
            self._fail(sequence.request.id, sequence.index, made.code, f"guided: {message}")
        self._pump()


def make_matching(tokenizer_info: Callable[[], TokenizerInfo | None], facts: ModelFacts) -> Matching:
    """Matchers for this model's vocabulary, by llguidance. May take a second. Raises InvalidRequest."""
    try:
        from .llg import LlgMatching
    except ImportError as error:
        raise InvalidRequest("guided: this service has no llguidance; pip install 'treadle[guided]'") from error
    info = tokenizer_info()
    if info is None:
        raise InvalidRequest("guided: this model came without a tokenizer")
    return LlgMatching(info.tokenizer_json.decode(), facts.vocab_size, facts.eos_token_ids)
