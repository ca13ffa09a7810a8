"""Compiling grammars and making masks beside the scheduler's loop: on threads, with limits of time and number."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from treadle.errors import InvalidParameter, Overloaded
from treadle.scheduler.request import Request, Sequence
from treadle.transport.messages import Guided

from .cache import GrammarCache, Key
from .matching import Grammar, Matching
from .pending import MasksDue
from .rows import GuidedRows, MadeMasks, MaskJob

logger = logging.getLogger("treadle")
_COMPILERS = 2
_MAX_COMPILING = 64
_RETRY_SECONDS = 1.0


class Guide:
    """Runs on one loop; `make` and everything of `Matching` run on threads.

    make: the library for this model's vocabulary, called at the first guided request; it may take a second and raise
    InvalidRequest. seconds: how long a grammar may take to compile, the wait for others included.
    """

    def __init__(self, make: Callable[[], Matching], seconds: float) -> None:
        self._make = make
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._compilers = ThreadPoolExecutor(_COMPILERS, "treadle-grammar")
        self._masks = ThreadPoolExecutor(1, "treadle-masks")
        self._matching: asyncio.Future[Matching] | None = None
        self._ready: Matching | None = None
        self._cache = GrammarCache()
        self._compiling: dict[Key, asyncio.Future[Grammar]] = {}
        self._rows = GuidedRows()

    def close(self) -> None:
        """What runs is not waited for; nothing of it is delivered."""
        for pool in (self._compilers, self._masks):
            pool.shutdown(wait=False, cancel_futures=True)

    # ── grammars ──

    def cached(self, guided: Guided) -> Grammar | None:
        """A grammar that was compiled before."""
        return self._cache.get(guided.source)

    async def compile(self, guided: Guided) -> Grammar:
        """Raises InvalidRequest and its kinds, and Overloaded when too many are being compiled."""
        await self._load()
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(self._compile(guided))
        except TimeoutError:
            raise InvalidParameter(
                f"guided: the grammar was not compiled within {self._seconds:g} s; give a simpler one, or more time "
                "with grammar_timeout (--grammar-timeout)"
            ) from None

    async def _load(self) -> Matching:
        """Who comes while it is being made waits for it; where it could not be made, the next one tries again."""
        if self._matching is None or (self._matching.done() and self._matching.exception() is not None):
            self._matching = self._loop.run_in_executor(self._compilers, self._make)
        self._ready = await asyncio.shield(self._matching)
        return self._ready

    def _compile(self, guided: Guided) -> asyncio.Future[Grammar]:
        key = guided.source
        running = self._compiling.get(key)
        if running is None:
            if len(self._compiling) >= _MAX_COMPILING:
                raise Overloaded(f"{_MAX_COMPILING} grammars are being compiled, which is the limit", _RETRY_SECONDS)
            if self._ready is None:
                raise InvalidParameter("guided: nothing to compile with")
            running = self._loop.run_in_executor(self._compilers, self._ready.compile, guided)
            self._compiling[key] = running
            running.add_done_callback(lambda future: self._compiled(key, future))
        return running

    def _compiled(self, key: Key, future: asyncio.Future[Grammar]) -> None:
        del self._compiling[key]
        if not future.cancelled() and future.exception() is None:
            self._cache.put(key, future.result())

    # ── masks ──

    def begin(self, request: Request, grammar: Grammar) -> None:
        """The request was accepted; its sequences are guided until `forget`."""
        self._rows.begin(request, grammar)

    def forget(self, sequence: Sequence) -> None:
        self._rows.forget(sequence)

    def make_masks(self, due: MasksDue, done: Callable[[MadeMasks], None]) -> None:
        """Calls `done` on the loop, in the order of the calls."""
        self._masks.submit(self._run, self._rows.job(due), done)

    def _run(self, job: MaskJob, done: Callable[[MadeMasks], None]) -> None:
        matching = self._ready
        if matching is None:
            return  # nobody is guided before there is something to compile with
        try:
            made = job.run(matching)
        except BaseException as error:  # whatever a library does, the others of the step must not wait for ever
            logger.exception("masks of step %d", job.step)
            made = job.fail(matching, f"its grammar failed: {type(error).__name__}: {error}")
        try:
            self._loop.call_soon_threadsafe(done, made)
        except RuntimeError:
            logger.debug("the loop is closed: nobody waits for masks any more")
