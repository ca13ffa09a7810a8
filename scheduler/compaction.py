"""Writing a journal anew, without what has ended, while it goes on being written.

It happens on a thread. Reading a large journal takes Python seconds, and whoever holds its lock that long holds up
every stream; so the thread sleeps after each millisecond of work, for as long. What is appended meanwhile is copied
behind, in a few rounds that get shorter, each of them synced. What is left then, which came during the last round, is
copied by whoever exchanges the files: on the loop, so where it is much, the journal stays as it is.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .journal_file import copy_from, discard, unfinished, write_anew

_WORK_SECONDS = 0.001
_LAST_BYTES = 1 << 16
_MOST_LAST_BYTES = 1 << 20  # a millisecond or less, into memory
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
    """Of the journal at `path`, into `new`. One `run` at a time."""

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
                end = size()
                await asyncio.to_thread(self._copy, file, copied, end)
                length += end - copied
                copied = end
                if size() - copied <= _LAST_BYTES:
                    break
            if (left := size() - copied) > _MOST_LAST_BYTES:
                raise OSError(f"{left} bytes came while the last of it was copied: the disk is too slow")
        except BaseException:
            discard(self._new, file)
            raise
        return Anew(file, length, copied)

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
