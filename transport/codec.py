"""Bytes to structs and back, with types and size limits, and the digest that ranks answer with."""

from __future__ import annotations

import zlib
from array import array
from typing import Final, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.errors import ProtocolError

from .messages import ClientMessage, EngineMessage, PlanMessage, ServiceMessage

MAX_CLIENT_FRAME: Final = 16 << 20
MAX_ENGINE_FRAME: Final = 256 << 20

T = TypeVar("T")
Int32 = npt.NDArray[np.int32]
UInt32 = npt.NDArray[np.uint32]
_WIRE_INT: Final = np.dtype("<i4")
_UNSIGNED: Final = np.dtype("<u4")


def pack(values: npt.ArrayLike) -> bytes:
    """Integers to int32 bytes, little-endian as all machines are that this runs on. A list must be flat; it takes a
    fraction of the time that it takes through numpy."""
    if isinstance(values, list):
        return array("i", values).tobytes()
    if isinstance(values, np.ndarray):
        return values.astype(_WIRE_INT).tobytes()
    return np.asarray(values, dtype=_WIRE_INT).tobytes()


def unpack(data: bytes) -> Int32:
    """Little-endian int32 bytes to a read-only view; raises ProtocolError when the length is not a multiple of 4."""
    _check_width(data)
    return np.frombuffer(data, _WIRE_INT)  # by its name, the type takes half as long again


def unpack_unsigned(data: bytes) -> UInt32:
    """As `unpack`, where a negative number is a very great one: so one comparison finds all ids out of range."""
    _check_width(data)
    return np.frombuffer(data, _UNSIGNED)


def _check_width(data: bytes) -> None:
    if len(data) % 4:
        raise ProtocolError(f"an int32 field of {len(data)} bytes: the length must be a multiple of 4")


class Codec(Generic[T]):
    """Encodes anything, decodes only the union it was made for, and nothing longer than `max_frame` bytes."""

    def __init__(self, decodes: object, max_frame: int) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(decodes)
        self._max_frame = max_frame

    def encode(self, message: msgspec.Struct) -> bytes:
        return self._encoder.encode(message)

    def decode(self, frame: bytes | memoryview) -> T:
        """Raises ProtocolError on a frame that is too long, is not msgpack, or is not one of the known messages."""
        if len(frame) > self._max_frame:
            raise ProtocolError(f"a frame of {len(frame)} bytes: at most {self._max_frame} are allowed")
        try:
            return self._decoder.decode(frame)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a frame that cannot be decoded: {error}") from error


def rank_codec() -> Codec[PlanMessage]:
    """What a rank uses: decodes plans."""
    return Codec(PlanMessage, MAX_ENGINE_FRAME)


def engine_codec() -> Codec[EngineMessage]:
    """What the scheduler uses towards ranks: decodes results."""
    return Codec(EngineMessage, MAX_ENGINE_FRAME)


def client_codec() -> Codec[ServiceMessage]:
    """What a client uses: decodes what the service sends."""
    return Codec(ServiceMessage, MAX_ENGINE_FRAME)


def service_codec() -> Codec[ClientMessage]:
    """What the service uses towards clients: decodes requests."""
    return Codec(ClientMessage, MAX_CLIENT_FRAME)


class Digest:
    """Running CRC-32 over plans and sampled tokens; equal on every rank and on the scheduler, or somebody is wrong."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, data: bytes) -> int:
        self.value = zlib.crc32(data, self.value)
        return self.value
