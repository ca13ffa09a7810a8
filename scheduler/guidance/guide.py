"""Compiling grammars and making masks beside the scheduler's loop: on threads, with limits of time and number."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from treadle.errors import InvalidParameter, Overloaded
from treadle.scheduler.request import Request, Sequence
from treadle.transport.mask_pages import MaskPages
from treadle.transport.messages import Guided

from .cache import GrammarCache, Key
from .compilers import Compilers, Job
from .matching import Grammar, Matching
from .pending import MasksDue
from .rows import GuidedRows, MadeMasks, MaskJob, MaskMemory

logger = logging.getLogger("treadle")
AT_ONCE = 2
_MOST_LEFT = 2
_MAX_COMPILING = 64
_RETRY_SECONDS = 1.0
_HANDOVER_SECONDS = 0.002


class Guide:
    """Runs on one loop; `make` and everything of `Matching` run on threads.

    make: the library for this model's vocabulary, called at the first guided request; it may take a second and raise
    InvalidRequest. seconds: how long a grammar may take to compile, and how long a request waits for that. Two that
    take longer may hold a thread each without holding up the others.
    """

    def __init__(self, make: Callable[[], Matching], seconds: float) -> None:
        self._make = make
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._compilers = Compilers(seconds, AT_ONCE, _MOST_LEFT)
        self._masks = ThreadPoolExecutor(1, "treadle-masks")
        self._memory = MaskMemory()
        self._begun = threading.Event()
        self._asked = self._made = 0
        self._matching: asyncio.Future[Matching] | None = None
        self._ready: Matching | None = None
        self._cache = GrammarCache()
        self._compiling: dict[Key, Job] = {}
        self._rows = GuidedRows()

    def close(self) -> None:
        """What runs is not waited for; nothing of it is delivered."""
        self._compilers.close()
        self._masks.shutdown(wait=False, cancel_futures=True)
        self._rows = GuidedRows()  # for rows that are gone no grammar is compiled again

    # ── grammars ──

    def cached(self, guided: Guided) -> Grammar | None:
        """A grammar that was compiled before."""
        return self._cache.get(guided.source)

    async def compile(self, guided: Guided) -> Grammar:
        """One that was compiled before is there at once. Raises InvalidRequest and its kinds, and Overloaded when too
        many are being compiled."""
        cached = self.cached(guided)
        if cached is not None:
            return cached
        job = self._compile(guided, await self._load())
        if job.late:
            raise self._too_long()
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(job.future)
        except TimeoutError:
            if job.late:  # its own timer was set first
                raise self._too_long() from None
            raise Overloaded(f"guided: others were being compiled for {self._seconds:g} s", _RETRY_SECONDS) from None

    def _too_long(self) -> InvalidParameter:
        return InvalidParameter(
            f"guided: the grammar was not compiled within {self._seconds:g} s; give a simpler one, or more time "
            "with grammar_timeout (--grammar-timeout)"
        )

    async def _load(self) -> Matching:
        """Who comes while it is being made waits for it; where it could not be made, the next one tries again."""
        if self._matching is None or (self._matching.done() and self._matching.exception() is not None):
            self._matching = self._loop.run_in_executor(None, self._make)
        self._ready = await asyncio.shield(self._matching)
        return self._ready

    def _compile(self, guided: Guided, matching: Matching) -> Job:
        key = guided.source
        job = self._compiling.get(key)
        if job is None:
            if len(self._compiling) >= _MAX_COMPILING:
                raise Overloaded(f"{_MAX_COMPILING} grammars are being compiled, which is the limit", _RETRY_SECONDS)
            job = self._compiling[key] = self._compilers.run(lambda: matching.compile(guided))
            job.future.add_done_callback(lambda future: self._compiled(key, future))
        return job

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

    def make_masks(self, due: MasksDue, pages: MaskPages | None, done: Callable[[MadeMasks], None]) -> None:
        """Calls `done` on the loop, in the order of the calls. pages: of the group that is going to read them.

        The ranks wait for these masks. The thread that makes them and this loop have one lock of Python's: they would
        take turns, and what the loop does next helps nobody as much. So it waits until the library is at work.
        """
        job, idle = self._rows.job(due), self._asked == self._made
        self._asked += 1
        self._begun.clear()
        self._masks.submit(self._run, job, pages, done)
        if idle:
            self._begun.wait(_HANDOVER_SECONDS)

    def _run(self, job: MaskJob, pages: MaskPages | None, done: Callable[[MadeMasks], None]) -> None:
        matching = self._ready
        if matching is None:
            return  # nobody is guided before there is something to compile with
        try:
            made = job.run(matching, self._memory, self._begun.set, pages)
        except BaseException as error:  # whatever a library does, the others of the step must not wait for ever
            logger.exception("masks of step %d", job.step)
            made = job.fail(matching, f"its grammar failed: {type(error).__name__}: {error}")
        finally:
            self._made += 1
            self._begun.set()
        try:
            self._loop.call_soon_threadsafe(self._deliver, made, done)
        except RuntimeError:
            logger.debug("the loop is closed: nobody waits for masks any more")

    def _deliver(self, made: MadeMasks, done: Callable[[MadeMasks], None]) -> None:
        if made.failed:
            self._cache.drop_spent()
        done(made)
