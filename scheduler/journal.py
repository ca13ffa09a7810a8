"""What was accepted survives the scheduler: an append-only file of requests, their tokens, and their ends.

A record is a length, a CRC-32 of the rest, and a msgpack struct. What one turn of the loop brings is written by one
`write` before anybody is told, so it survives the death of the process, whatever ends it. `fsync`, which it takes to
survive the death of the machine, runs in a thread at most every `sync_seconds`: the last of them may be lost then, and
the clients, who have their own tokens, make up for it. A torn end is cut off, and what has ended is left behind when a
journal is opened.

The file holds prompts and answers: its mode is 0600, and a lock keeps a second service away.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from treadle.errors import ConfigError
from treadle.transport.codec import pack, unpack
from treadle.transport.messages import Submit

logger = logging.getLogger("treadle")
_HEAD = struct.Struct("<II")
_MAX_RECORD = 64 << 20
_COMPACT_BYTES = 256 << 20


class Accepted(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A request begins. number: its name in this file."""

    number: int
    submit: Submit


class Tokens(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """What a step brought. numbers, indices, tokens: int32, parallel."""

    numbers: bytes
    indices: bytes
    tokens: bytes


class Ended(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """A continuation has ended."""

    number: int
    index: int


Record = Accepted | Tokens | Ended


@dataclass(slots=True)
class _Open:
    submit: Submit
    outputs: list[list[int]]
    ended: set[int] = field(default_factory=set)

    def resubmission(self) -> Submit:
        outputs = [pack(tokens) for tokens in self.outputs]
        return msgspec.structs.replace(self.submit, outputs=outputs, ended=sorted(self.ended))


def read_journal(path: Path) -> dict[int, Submit]:
    """The unfinished requests of a file by number, as they would be sent again, in the order in which they came."""
    decoder = msgspec.msgpack.Decoder(Record)
    found: dict[int, _Open] = {}
    data = path.read_bytes()
    at = 0
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if length > _MAX_RECORD or len(body) < length or zlib.crc32(body) != crc:
            logger.warning("journal %s: torn at byte %d of %d; what follows is left out", path, at, len(data))
            break
        try:
            _apply(found, decoder.decode(body))
        except msgspec.DecodeError as error:
            raise ConfigError(f"journal {path}: of another version, at byte {at}: {error}") from error
        at += _HEAD.size + length
    return {number: entry.resubmission() for number, entry in found.items()}


def _apply(found: dict[int, _Open], record: Record) -> None:
    if isinstance(record, Accepted):
        submit = record.submit
        outputs = [unpack(output).tolist() for output in submit.outputs] or [[] for _ in range(submit.params.n)]
        found[record.number] = _Open(submit, outputs, set(submit.ended))
    elif isinstance(record, Tokens):
        rows = (unpack(field).tolist() for field in (record.numbers, record.indices, record.tokens))
        for number, index, token in zip(*rows, strict=True):
            if number in found:
                found[number].outputs[index].append(token)
    elif record.number in found:
        entry = found[record.number]
        entry.ended.add(record.index)
        if len(entry.ended) == entry.submit.params.n:
            del found[record.number]


class Journal:
    """An open journal; `unfinished` is what the last service left. Made on the loop's thread. Raises ConfigError."""

    def __init__(self, path: Path, sync_seconds: float) -> None:
        self._path = path
        self._sync_seconds = sync_seconds
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        self._numbers: list[int] = []
        self._indices: list[int] = []
        self._tokens: list[int] = []
        self._next = 0
        self._dirty = False
        self._failed = False
        self._syncing: asyncio.Task[None] | None = None
        self._lock = _lock(path)
        try:
            self.unfinished = read_journal(path) if path.exists() else {}
            self._next = max(self.unfinished, default=-1) + 1
            self._file, self._size = -1, 0
            self._begin(self.unfinished)
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
        that come back have more tokens than it.
        """
        self._put_tokens()
        if not self._buffer or self._failed:
            self._buffer.clear()
            return
        try:
            _write_all(self._file, self._buffer)
            self._size += len(self._buffer)
            self._buffer.clear()
            if self._size > self._compact_at:
                self._begin(read_journal(self._path))
        except (OSError, ConfigError) as error:
            self._end(error)
            return
        self._dirty = True
        if self._syncing is None:
            self._syncing = asyncio.get_running_loop().create_task(self._sync(), name="treadle-journal")

    async def close(self) -> None:
        """Whatever has not ended stays in the file, for the next service."""
        self.flush()
        if self._syncing is not None:
            self._syncing.cancel()
            await asyncio.gather(self._syncing, return_exceptions=True)
        with suppress(OSError):  # said before, or too late to matter
            os.fsync(self._file)
        os.close(self._file)
        os.close(self._lock)

    def _end(self, error: Exception) -> None:
        logger.error("journal %s: %s; nothing more is kept, and requests go on without it", self._path, error)
        self._failed = True
        self._buffer = bytearray()  # the error still holds a view of the other
        with suppress(OSError):
            os.ftruncate(self._file, self._size)  # half a record

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
        body = self._encoder.encode(record)
        self._buffer += _HEAD.pack(len(body), zlib.crc32(body))
        self._buffer += body

    def _begin(self, entries: Mapping[int, Submit]) -> None:
        """A new file with what is unfinished, in place of the old one."""
        new = self._path.with_name(self._path.name + ".new")
        for number, submit in entries.items():
            self._put(Accepted(number, submit))
        file = -1
        try:
            file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
            _write_all(file, self._buffer)
            os.fsync(file)
            os.replace(new, self._path)
        except OSError as error:
            if file >= 0:
                os.close(file)
            raise ConfigError(f"journal {self._path}: {error.strerror}") from error
        if self._file >= 0:
            os.close(self._file)
        self._file, self._size = file, len(self._buffer)
        self._compact_at = max(_COMPACT_BYTES, 2 * self._size)  # what is unfinished may itself be more
        self._buffer.clear()


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


def _write_all(file: int, data: bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
