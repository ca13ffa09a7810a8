"""The file of a journal: records of requests, their tokens and their ends, and reading back what is unfinished.

It begins with a mark, by which another's file is known and left alone. A record is a length, a CRC-32 of the rest, and
a msgpack struct.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

import msgspec

from treadle.errors import ConfigError
from treadle.transport.codec import pack, unpack
from treadle.transport.messages import Submit

logger = logging.getLogger("treadle")
_MARK = b"treadle journal 1\n"
_HEAD = struct.Struct("<II")
_MAX_RECORD = 64 << 20
_READ_AT_ONCE = 1 << 16
_WRITE_AT_ONCE = 1 << 18


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


Record: TypeAlias = Accepted | Tokens | Ended
Pace: TypeAlias = Callable[[], None]
"""Called once for each record that is read or written: the place to let others run."""


def at_once() -> None:
    """A pace for whoever has nothing else to do."""


@dataclass(slots=True)
class _Open:
    submit: Submit
    outputs: list[array[int]]  # int32
    ended: set[int] = field(default_factory=set)

    def resubmission(self) -> Submit:
        outputs = [pack(tokens) for tokens in self.outputs]
        return msgspec.structs.replace(self.submit, outputs=outputs, ended=sorted(self.ended))


class Encoder:
    """Records to bytes."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()

    def put(self, record: Record, into: bytearray) -> None:
        body = self._encoder.encode(record)
        into += _HEAD.pack(len(body), zlib.crc32(body))
        into += body


def check_mark(path: Path) -> None:
    """Raises ConfigError unless the file is a journal, by how it begins, or is not there."""
    try:
        with path.open("rb") as file:
            _read_mark(path, file)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"journal {path}: {error.strerror}") from error


def _read_mark(path: Path, file: BinaryIO) -> int:
    """How many bytes of the mark are there: fewer than all where the file was cut off in it."""
    mark = file.read(len(_MARK))
    if not _MARK.startswith(mark):
        raise ConfigError(f"journal {path}: it is there and is no journal of this version; name another file")
    return len(mark)


def read_journal(path: Path) -> dict[int, Submit]:
    """The unfinished requests of a file by number, as they would be sent again, in the order in which they came.

    Raises ConfigError.
    """
    return dict(unfinished(path, None, at_once))


def unfinished(path: Path, end: int | None, pace: Pace) -> Iterator[tuple[int, Submit]]:
    """The same one by one, of the first `end` bytes, or of all."""
    decoder = msgspec.msgpack.Decoder(Record)
    found: dict[int, _Open] = {}
    for at, body in _bodies(path, end):
        try:
            _apply(found, decoder.decode(body))
        except msgspec.DecodeError as error:
            raise ConfigError(f"journal {path}: of another version, at byte {at}: {error}") from error
        pace()
    for number, entry in found.items():
        yield number, entry.resubmission()
        pace()


def _bodies(path: Path, end: int | None) -> Iterator[tuple[int, bytes]]:
    """Each record and where it begins; what follows a torn or spoiled one is left out."""
    try:
        with path.open("rb", _READ_AT_ONCE) as file:
            size = os.fstat(file.fileno()).st_size if end is None else end
            at = _read_mark(path, file)
            while at + _HEAD.size <= size:
                length, crc = _HEAD.unpack(file.read(_HEAD.size))
                body = file.read(length) if length <= min(_MAX_RECORD, size - at - _HEAD.size) else b""
                if len(body) < length or zlib.crc32(body) != crc:
                    break
                yield at, body
                at += _HEAD.size + length
            if at < size:
                logger.warning("journal %s: torn at byte %d of %d; what follows is left out", path, at, size)
    except OSError as error:
        raise ConfigError(f"journal {path}: {error.strerror}") from error


def _apply(found: dict[int, _Open], record: Record) -> None:
    if isinstance(record, Accepted):
        submit = record.submit
        outputs = [array("i", unpack(output).tolist()) for output in submit.outputs]
        outputs = outputs or [array("i") for _ in range(submit.params.n)]
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


def write_anew(path: Path, entries: Iterable[tuple[int, Submit]]) -> tuple[int, int]:
    """A file of these requests alone. Returns its descriptor, for appending, and its size. Raises OSError.

    It is on disk then. Where it cannot be written, nothing is left.
    """
    encoder, buffer, size = Encoder(), bytearray(_MARK), 0
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        for number, submit in entries:
            encoder.put(Accepted(number, submit), buffer)
            if len(buffer) > _WRITE_AT_ONCE:
                write_all(file, buffer)
                size += len(buffer)
                buffer = bytearray()
        write_all(file, buffer)
        os.fsync(file)
    except BaseException:
        discard(path, file)
        raise
    return file, size + len(buffer)


def discard(path: Path, file: int) -> None:
    """A file that is not to take another's place. file: its descriptor."""
    os.close(file)
    with suppress(OSError):  # the next one writes over it
        path.unlink(missing_ok=True)


def copy_from(path: Path, file: int, begin: int, end: int) -> None:
    """Appends these bytes of a journal, whole records, to another. Raises OSError."""
    with path.open("rb") as source:
        source.seek(begin)
        while begin < end:
            data = source.read(min(_WRITE_AT_ONCE, end - begin))
            if not data:
                raise OSError(None, "the file has become shorter")
            write_all(file, data)
            begin += len(data)


def write_all(file: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync_directory(path: Path) -> None:
    """So that a file that was put in place of another is the one that is found after a fall."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
