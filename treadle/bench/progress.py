"""How far a run is: a line that is drawn over itself on a terminal."""

from __future__ import annotations

import time
from typing import TextIO

from .drive import Record

_SECONDS = 0.2
_BAR = 24


class Progress:
    """Shows nothing where `stream` is no terminal."""

    def __init__(self, stream: TextIO, requests: int) -> None:
        self._stream = stream if stream.isatty() else None
        self._requests = requests
        self._done = self._failed = self._tokens = 0
        self._began = self._said = time.monotonic()

    def seen(self, record: Record) -> None:
        self._done += 1
        self._failed += bool(record.error)
        self._tokens += record.usage.output
        now = time.monotonic()
        if self._stream is not None and (now - self._said >= _SECONDS or self._done == self._requests):
            self._said = now
            self._draw(self._stream, max(now - self._began, 1e-9))

    def _draw(self, stream: TextIO, seconds: float) -> None:
        filled = self._done * _BAR // max(self._requests, 1)
        failed = f", {self._failed} failed" if self._failed else ""
        stream.write(
            f"\r[{'#' * filled}{'.' * (_BAR - filled)}] {self._done}/{self._requests}{failed}, "
            f"{self._done / seconds:.1f} requests/s, {self._tokens / seconds:.0f} tokens/s   "
            + "\n"
            * (self._done == self._requests)
        )
        stream.flush()
