"""The event log: every input to a core and a digest of every decision, as frames in a file.

    file:  "treadle-events", version (uint16), then frames
    frame: length, CRC-32 of the payload, CRC-32 of these two (three uint32, little-endian), payload (a msgpack event)

The length has a checksum of its own: a file that ends inside a frame was cut off while being written, and anything
else that does not add up is damage. The first event of each run is `Opened`; a file may hold many runs.
`scheduler/recording.py` writes events, `scheduler/replay.py` reads them. The file holds token ids of prompts and
answers, so it is readable by its owner only.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from treadle.errors import ConfigError, EventLogError
from treadle.transport.codec import MAX_ENGINE_FRAME
from treadle.transport.messages import StepResult, Submit

MAGIC = b"treadle-events"
VERSION = 3
_FILE_HEAD = struct.Struct("<14sH")
_SUMMED = struct.Struct("<II")
_FRAME_HEAD = struct.Struct("<III")

logger = logging.getLogger("treadle")


class PlanDigest(msgspec.Struct, array_like=True, frozen=True):
    """CRC-32 of the parts of a plan, so that a difference has a name. starts: how many rows begin.

    copies: 0 where nothing moves to host memory or back, as in logs from before there was any.
    """

    step: int
    starts: int
    release: int
    start: int
    grow: int
    rows: int
    counts: int
    guided: int
    copies: int = 0


class OutputDigest(msgspec.Struct, array_like=True, frozen=True):
    """What came out. count: sequences that got a plain token; sequences, tokens: CRC-32 of who and what.

    others: CRC-32 of everything that ended or carries more than a token; ended: how many of these ended.
    """

    count: int
    sequences: int
    tokens: int
    ended: int
    others: int


class Event(msgspec.Struct, array_like=True, frozen=True):
    """Base of all events. now: the core's time, in seconds. raised: "Type: message" of what the core raised."""


class Opened(Event, frozen=True, tag=0):
    """A new core. at: seconds since 1970, so that the log can be found again in other logs. config: of the core.

    own_policy: name of a policy that was not chosen by name but given as an object; "" for none.
    """

    at: float
    protocol: int
    config: dict[str, Any]
    own_policy: str = ""


class Added(Event, frozen=True, tag=1):
    """seeds: those that the core drew for this request."""

    now: float
    submit: Submit
    seeds: list[int]
    raised: str = ""
    bounded: bool = True


class Aborted(Event, frozen=True, tag=2):
    now: float
    id: str
    index: int
    outputs: OutputDigest | None
    raised: str = ""


class Planned(Event, frozen=True, tag=3):
    """plan: None when the core had nothing to plan."""

    now: float
    plan: PlanDigest | None
    raised: str = ""


class Applied(Event, frozen=True, tag=4):
    """seconds: that the step took, for the core's cost model."""

    now: float
    result: StepResult
    seconds: float
    outputs: OutputDigest | None
    raised: str = ""


class WasReset(Event, frozen=True, tag=5):
    now: float
    outputs: OutputDigest | None
    raised: str = ""


class Expired(Event, frozen=True, tag=6):
    now: float
    outputs: OutputDigest | None
    raised: str = ""


class FailedAll(Event, frozen=True, tag=7):
    now: float
    code: str
    message: str
    outputs: OutputDigest | None
    raised: str = ""


class Failed(Event, frozen=True, tag=8):
    """One continuation, for a reason outside of the core."""

    now: float
    id: str
    index: int
    code: str
    message: str
    outputs: OutputDigest | None
    raised: str = ""


AnyEvent = Opened | Added | Aborted | Planned | Applied | WasReset | Expired | FailedAll | Failed


class Tail(msgspec.Struct, frozen=True):
    """Why reading ended before the end of the file. event: number of the first that could not be read.

    torn: the file ends inside a frame, as after a kill in the middle of a write; else it was changed or damaged.
    """

    offset: int
    event: int
    torn: bool
    reason: str

    def __str__(self) -> str:
        what = "the last event was cut off" if self.torn else "the file is damaged"
        return f"{what} at byte {self.offset}, event {self.event}: {self.reason}"


class EventReader:
    """Iterates over the events of a file. `tail` says afterwards what could not be read, None when nothing was left.

    end: bytes of the file that were good so far. Raises EventLogError for a file that is no event log or of another
    version, OSError for one that cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: Tail | None = None
        self.events = 0
        self.end = 0
        self._decoder = msgspec.msgpack.Decoder(AnyEvent)

    def __iter__(self) -> Iterator[AnyEvent]:
        with self.path.open("rb") as file:
            self._check_head(file.read(_FILE_HEAD.size))
            self.end = _FILE_HEAD.size
            while head := file.read(_FRAME_HEAD.size):
                try:
                    event = self._next(file, head)
                except _Unreadable as error:
                    self.tail = Tail(self.end, self.events, error.torn, str(error))
                    return
                self.events += 1
                yield event

    def _check_head(self, head: bytes) -> None:
        if len(head) < _FILE_HEAD.size or not head.startswith(MAGIC):
            raise EventLogError(f"{self.path} is not an event log")
        version = _FILE_HEAD.unpack(head)[1]
        if version != VERSION:
            raise EventLogError(f"{self.path} is an event log of version {version}; this program reads {VERSION}")

    def _next(self, file: BinaryIO, head: bytes) -> AnyEvent:
        if len(head) < _FRAME_HEAD.size:
            raise _Unreadable("the head of a frame is incomplete", torn=True)
        length, check, head_check = _FRAME_HEAD.unpack(head)
        if zlib.crc32(head[: _SUMMED.size]) != head_check or length > MAX_ENGINE_FRAME:
            raise _Unreadable("the head of a frame has a wrong checksum")
        payload = file.read(length)
        if len(payload) < length:
            raise _Unreadable(f"{len(payload)} of {length} bytes are there", torn=True)
        if zlib.crc32(payload) != check:
            raise _Unreadable("a wrong checksum")
        try:
            event: AnyEvent = self._decoder.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _Unreadable(f"an event that cannot be decoded: {error}") from error
        self.end += len(head) + length
        return event


class _Unreadable(Exception):
    def __init__(self, reason: str, torn: bool = False) -> None:
        super().__init__(reason)
        self.torn = torn


class EventWriter:
    """Appends events to a file of mode 0600. One system call per event, so a killed process loses none before its last.

    A file that exists must be an event log: this run goes behind the runs in it, and an event that was cut off at its
    end is removed first. When the disk is full, or fails, recording ends with an error message and the service goes on.
    Raises ConfigError for a path that cannot be used and EventLogError for a file that is not, or not wholly, a log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._file = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"event_log={str(path)!r}: {error.strerror}") from error
        try:
            self._take_over()
        except BaseException:
            self.close()
            raise

    def write(self, event: Event) -> None:
        if self._file < 0:
            return
        buffer = self._buffer
        self._encoder.encode_into(event, buffer, _FRAME_HEAD.size)
        with memoryview(buffer) as view:
            summed = len(buffer) - _FRAME_HEAD.size, zlib.crc32(view[_FRAME_HEAD.size :])
        _FRAME_HEAD.pack_into(buffer, 0, *summed, zlib.crc32(_SUMMED.pack(*summed)))
        self._append(buffer)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take_over(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"event_log={str(self._path)!r}: another service writes to it") from None
        except OSError as error:
            raise ConfigError(f"event_log={str(self._path)!r}: {error.strerror}") from error
        os.fchmod(self._file, 0o600)
        self._end = os.fstat(self._file).st_size
        if self._end:
            self._continue()
        else:
            self._append(_FILE_HEAD.pack(MAGIC, VERSION))

    def _continue(self) -> None:
        reader = EventReader(self._path)
        for _ in reader:
            pass
        if reader.tail is not None:
            if not reader.tail.torn:
                raise EventLogError(f"{self._path}: {reader.tail}; nothing is appended to it")
            logger.warning("%s: %s; it is removed", self._path, reader.tail)
            os.ftruncate(self._file, reader.end)
        self._end = reader.end

    def _append(self, data: bytes | bytearray) -> None:
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a disk that is nearly full takes a part
                written += os.write(self._file, data[written:])
            self._end += written
        except OSError as error:
            logger.error("the event log %s ends here, the service goes on: %s", self._path, error)
            os.ftruncate(self._file, self._end)
            self.close()
