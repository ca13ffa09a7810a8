"""Threads that compile grammars, a few at a time.

Nothing ends a compilation from outside: llguidance bounds the work of its lexer (`LLParserLimits`), not that of
building a grammar. So whoever takes too long is left to itself, and another takes its place. How many may be left is
bounded, for each of them keeps a processor busy.

The threads are daemons, for a program must not wait for one that never ends. It does wait for a moment: llguidance
does not survive it when Python's lock, which it has given up, is gone when it wants it again.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from treadle.errors import Overloaded

from .matching import Grammar

logger = logging.getLogger("treadle")
_RETRY_SECONDS = 10.0
_LAST_SECONDS = 0.5


@dataclass(eq=False, slots=True)
class Job:
    """late: it has had its time, and its thread still works. timer: of its time."""

    work: Callable[[], Grammar]
    future: asyncio.Future[Grammar]
    late: bool = False
    timer: asyncio.TimerHandle | None = None


class Compilers:
    """Methods run on one loop. seconds: what a job may take. at_once: threads in time. most_left: beside them."""

    def __init__(self, seconds: float, at_once: int, most_left: int) -> None:
        self._seconds = seconds
        self._at_once = at_once
        self._most_left = most_left
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Job] = deque()
        self._working: set[Job] = set()
        self._left: set[Job] = set()
        self._closed = False

    def run(self, work: Callable[[], Grammar]) -> Job:
        """Raises Overloaded where every thread is held by a job that has had its time."""
        if len(self._working) == self._at_once and all(job.late for job in self._working):
            raise Overloaded(
                f"guided: {len(self._working) + len(self._left)} grammars have not been compiled in their time and "
                "still hold all threads; one that was compiled before is served",
                _RETRY_SECONDS,
            )
        job = Job(work, self._loop.create_future())
        self._waiting.append(job)
        self._begin()
        return job

    def close(self) -> None:
        """What runs is not waited for, and nothing of it is delivered."""
        self._closed = True
        for job in (*self._waiting, *self._working, *self._left):
            job.future.cancel()
        self._waiting.clear()

    def _begin(self) -> None:
        for job in [job for job in self._working if job.late][: self._most_left - len(self._left)]:
            self._working.discard(job)
            self._left.add(job)
            logger.warning("a grammar is not compiled after %g s; %d such go on", self._seconds, len(self._left))
        while self._waiting and len(self._working) < self._at_once and not self._closed:
            self._start(self._waiting.popleft())

    def _start(self, job: Job) -> None:
        try:
            threading.Thread(target=_until_exit, args=[self._run, job], name="treadle-grammar", daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            job.future.set_exception(Overloaded(f"guided: no thread to compile a grammar: {error}", _RETRY_SECONDS))
            return
        self._working.add(job)
        job.timer = self._loop.call_later(self._seconds, self._overdue, job)

    def _overdue(self, job: Job) -> None:
        if job in self._working:
            job.late = True
            self._begin()

    def _run(self, job: Job) -> None:
        grammar, failure = None, None
        try:
            grammar = job.work()
        except BaseException as error:  # whatever it is, somebody waits for it
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ended, job, grammar, failure)

    def _ended(self, job: Job, grammar: Grammar | None, failure: BaseException | None) -> None:
        self._working.discard(job)
        self._left.discard(job)
        if job.timer is not None:  # it would keep the grammar for as long
            job.timer.cancel()
        if not job.future.done():
            if failure is not None:
                job.future.set_exception(failure)
            elif grammar is not None:
                job.future.set_result(grammar)
        self._begin()


def _until_exit(run: Callable[[Job], None], job: Job) -> None:
    """Runs it on this thread. Python, when it ends meanwhile, waits a moment for that."""
    wait = partial(threading.current_thread().join, _LAST_SECONDS)
    atexit.register(wait)
    try:
        run(job)
    finally:
        atexit.unregister(wait)
