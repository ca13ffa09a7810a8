"""The thread that sends traces, so that a slow collector, or none, costs the scheduler nothing."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from treadle.scheduler.request_trace import RequestTrace

logger = logging.getLogger("treadle")
MOST_WAITING = 2048
_BATCH = 64
_CLOSE_SECONDS = 3.0


class Sender(Protocol):
    """Used by the thread alone, but for `shutdown`."""

    def send(self, traces: Sequence[RequestTrace]) -> bool:
        """Whether they arrived."""

    def shutdown(self) -> None:
        """Ends a `send` that waits."""


class TraceExporter:
    """A bounded queue and its reader. What the queue has no room for, or nobody takes, is dropped and counted.

    exported: traces that arrived.
    """

    def __init__(self, sender: Sender) -> None:
        self.exported = 0
        self._sender = sender
        self._failed = 0
        self._refused = 0
        self._waiting: deque[RequestTrace] = deque()
        self._news = threading.Condition()
        self._closing = False
        self._complained = False
        self._thread = threading.Thread(target=self._run, name="treadle-traces", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._failed + self._refused

    def put(self, trace: RequestTrace) -> None:
        """Never waits."""
        if len(self._waiting) >= MOST_WAITING:
            self._refused += 1
            return
        with self._news:
            self._waiting.append(trace)
            self._news.notify()

    def close(self) -> None:
        """Sends what is left, for a few seconds at most. Blocks; a thread's work."""
        with self._news:
            self._closing = True
            self._news.notify()
        self._thread.join(_CLOSE_SECONDS)
        self._sender.shutdown()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        while batch := self._next():
            try:
                arrived = self._sender.send(batch)
            except Exception:  # whatever it is, requests are served all the same
                logger.exception("sending traces raised")
                arrived = False
            if arrived:
                self.exported += len(batch)
                self._complained = False
                continue
            self._failed += len(batch)
            if not self._complained:
                logger.warning("the collector of traces takes nothing: they are dropped until it does")
                self._complained = True

    def _next(self) -> list[RequestTrace]:
        """Waits for some; none when it is over."""
        with self._news:
            while not self._waiting and not self._closing:
                self._news.wait()
            return [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
