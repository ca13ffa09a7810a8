"""What was accepted survives the scheduler: an append-only file of requests, their tokens, and their ends.

What one turn of the loop brings is written by one `write` before anybody is told, so it survives the death of the
process, whatever ends it. `fsync`, which it takes to survive the death of the machine, runs in a thread at most every
`sync_seconds`: the last of them may be lost then, and what came while one ran; the clients, who have their own tokens,
make up for it. A torn end is cut off, and what has ended is left behind when a journal is opened and when it has become
large.

The file (`journal_file`) holds prompts and answers: its mode is 0600, and a lock keeps a second service away.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
from contextlib import suppress
from pathlib import Path

from treadle.errors import ConfigError
from treadle.transport.codec import pack
from treadle.transport.messages import Submit

from .compaction import Anew, Compaction, Stopped
from .journal_file import (
    Accepted,
    Encoder,
    Ended,
    Record,
    Tokens,
    copy_from,
    discard,
    read_journal,
    sync_directory,
    write_all,
    write_anew,
)

logger = logging.getLogger("treadle")
_COMPACT_BYTES = 256 << 20


class Journal:
    """An open journal; `unfinished` is what the last service left. Used on one loop, made anywhere: reading a large one
    takes seconds. Raises ConfigError."""

    def __init__(self, path: Path, sync_seconds: float) -> None:
        self._path = path
        self._sync_seconds = sync_seconds
        self._new = path.with_name(path.name + ".new")
        self._encoder = Encoder()
        self._buffer = bytearray()
        self._numbers: list[int] = []
        self._indices: list[int] = []
        self._tokens: list[int] = []
        self._next = 0
        self._dirty = False
        self._failed = False
        self._syncing: asyncio.Task[None] | None = None
        self._compaction = Compaction(path, self._new)
        self._compacting: asyncio.Task[None] | None = None
        self._lock = _lock(path)
        try:
            self.unfinished = read_journal(path) if path.exists() else {}
            self._next = max(self.unfinished, default=-1) + 1
            self._file, self._size = self._begin()
            self._compact_at = _next_size(self._size)
        except BaseException:
            os.close(self._lock)
            raise

    def accept(self, submit: Submit) -> int:
        """A request was accepted. Returns its number; on disk with the next `flush`."""
        number, self._next = self._next, self._next + 1
        self._put(Accepted(number, submit))
        return number

    def token(self, number: int, index: int, token: int) -> None:
        self._numbers.append(number)
        self._indices.append(index)
        self._tokens.append(token)

    def end(self, number: int, index: int) -> None:
        self._put_tokens()
        self._put(Ended(number, index))

    def end_all(self, number: int, submit: Submit) -> None:
        """A request that cannot go on."""
        for index in set(range(submit.params.n)) - set(submit.ended):
            self.end(number, index)
        self.flush()

    def flush(self) -> None:
        """One write of all that has come since the last.

        Where the disk takes no more, the journal ends and the service goes on: what is in it stays good, and clients
        that come back have more tokens than it. While it is written anew the disk may be full of that alone: what has
        come waits then for the next flush, the last of them when that has ended.
        """
        self._put_tokens()
        if not self._buffer or self._failed:
            self._buffer.clear()
            return
        try:
            write_all(self._file, self._buffer)
        except OSError as error:
            if self._compacting is None or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._end(error)
            else:
                self._wait_for_room()
            return
        self._size += len(self._buffer)
        self._buffer.clear()
        if self._size > self._compact_at and self._compacting is None:
            self._compacting = asyncio.get_running_loop().create_task(self._compact(), name="treadle-compaction")
        self._sync_soon()

    async def close(self) -> None:
        """Whatever has not ended stays in the file, for the next service."""
        self.flush()
        self._compaction.stop()
        while self._compacting is not None and not self._compacting.done():  # what waited for it may begin another
            await asyncio.gather(self._compacting, return_exceptions=True)
        if self._syncing is not None:
            self._syncing.cancel()
            await asyncio.gather(self._syncing, return_exceptions=True)
        with suppress(OSError):  # said before, or too late to matter
            os.fsync(self._file)
        os.close(self._file)
        os.close(self._lock)

    def _wait_for_room(self) -> None:
        self._buffer = bytearray(self._buffer)  # the error still holds a view of the other, which cannot grow
        try:
            os.ftruncate(self._file, self._size)  # half a record
        except OSError as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        logger.error("journal %s: %s; nothing more is kept, and requests go on without it", self._path, error)
        self._failed = True
        self._buffer = bytearray()  # the error still holds a view of the other
        with suppress(OSError):
            os.ftruncate(self._file, self._size)  # half a record

    def _sync_soon(self) -> None:
        self._dirty = True
        if self._syncing is None:
            self._syncing = asyncio.get_running_loop().create_task(self._sync(), name="treadle-journal")

    async def _sync(self) -> None:
        while self._dirty and not self._failed:
            self._dirty = False
            try:
                await asyncio.to_thread(_sync_and_close, os.dup(self._file))
            except OSError as error:
                self._end(error)
            await asyncio.sleep(self._sync_seconds)
        self._syncing = None

    def _put_tokens(self) -> None:
        if self._tokens:
            self._put(Tokens(pack(self._numbers), pack(self._indices), pack(self._tokens)))
            self._numbers.clear()
            self._indices.clear()
            self._tokens.clear()

    def _put(self, record: Record) -> None:
        self._encoder.put(record, self._buffer)

    def _begin(self) -> tuple[int, int]:
        """A new file with what is unfinished, in place of the old one."""
        try:
            file, size = write_anew(self._new, self.unfinished.items())
            try:
                os.replace(self._new, self._path)
                sync_directory(self._path.parent)
            except BaseException:
                discard(self._new, file)
                raise
        except OSError as error:
            raise ConfigError(f"journal {self._path}: {error.strerror}") from error
        return file, size

    async def _compact(self) -> None:
        """The same while it is written. Where that is not possible, on a full disk most likely, the old one goes on."""
        try:
            anew = await self._compaction.run(lambda: self._size)
            self._exchange(anew)
            await asyncio.to_thread(sync_directory, self._path.parent)
        except Stopped:
            pass
        except (OSError, ConfigError) as error:
            logger.warning("journal %s: what has ended is not left out yet: %s", self._path, error)
        finally:
            self._compact_at = _next_size(self._size)
            self._compacting = None
            self.flush()  # what waited for room

    def _exchange(self, anew: Anew) -> None:
        """What is copied here is in the new file, and not yet synced, as it may have been in the old one: it came while
        the round before it was copied and synced, and is synced with what comes next.
        """
        try:
            if self._failed:
                raise Stopped
            copy_from(self._path, anew.file, anew.copied, self._size)
            os.replace(self._new, self._path)
        except BaseException:
            discard(self._new, anew.file)
            raise
        os.close(self._file)
        self._file, self._size = anew.file, anew.size + self._size - anew.copied
        self._sync_soon()


def _next_size(size: int) -> int:
    """When a journal is to be written anew; what is unfinished may itself be more than usual."""
    return max(_COMPACT_BYTES, 2 * size)


def _lock(path: Path) -> int:
    """Beside the journal, which is replaced now and then. Held as long as the descriptor is open."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"journal {path}: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConfigError(f"journal {path}: another service writes it; give each one of its own") from None
    return descriptor


def _sync_and_close(file: int) -> None:
    """A descriptor of its own: the journal's may be closed meanwhile, when another file takes its place."""
    try:
        os.fsync(file)
    finally:
        os.close(file)
