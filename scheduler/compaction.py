"""Writing a journal anew, without what has ended, while it goes on being written.

It happens on a thread. Reading a large journal takes Python seconds, and whoever holds its lock that long holds up
every stream; so the thread sleeps after each millisecond of work, for as long. What is appended meanwhile is copied
behind, in a few rounds that get shorter, and what is left then by whoever exchanges the files.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .journal_file import copy_from, unfinished, write_anew

_WORK_SECONDS = 0.001
_LAST_BYTES = 1 << 16
_MOST_ROUNDS = 4


class Stopped(Exception):
    """The journal is being closed."""


@dataclass(frozen=True, slots=True)
class Anew:
    """file: the new one, for appending. size: of it. copied: how much of the old one is in it."""

    file: int
    size: int
    copied: int


class Compaction:
    """Of the journal at `path`, into `new`. `run` once."""

    def __init__(self, path: Path, new: Path) -> None:
        self._path = path
        self._new = new
        self._stopped = threading.Event()
        self._due = 0.0

    def stop(self) -> None:
        """`run` raises Stopped, soon, unless it has come to its end."""
        self._stopped.set()

    async def run(self, size: Callable[[], int]) -> Anew:
        """size: of the journal, now; whole records. Raises ConfigError, OSError or Stopped, and leaves nothing then."""
        copied = size()
        file, length = await asyncio.to_thread(self._write, copied)
        try:
            for _ in range(_MOST_ROUNDS):  # a slow disk may never come closer
                self._check()
                if (end := size()) - copied <= _LAST_BYTES:
                    break
                await asyncio.to_thread(self._copy, file, copied, end)
                length += end - copied
                copied = end
        except BaseException:
            self.discard(file)
            raise
        return Anew(file, length, copied)

    def discard(self, file: int) -> None:
        os.close(file)
        self._new.unlink(missing_ok=True)

    def _write(self, end: int) -> tuple[int, int]:
        self._due = time.perf_counter() + _WORK_SECONDS
        return write_anew(self._new, unfinished(self._path, end, self._pace))

    def _copy(self, file: int, begin: int, end: int) -> None:
        copy_from(self._path, file, begin, end)
        os.fsync(file)

    def _pace(self) -> None:
        now = time.perf_counter()
        if now > self._due:
            self._check()
            time.sleep(_WORK_SECONDS + now - self._due)
            self._due = time.perf_counter() + _WORK_SECONDS

    def _check(self) -> None:
        if self._stopped.is_set():
            raise Stopped
