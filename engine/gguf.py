"""The GGUF container: metadata and the table of tensors, from the header alone.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian). The file is mapped,
not read; string arrays (vocabularies) are only walked over, and made into Python strings when somebody asks for them.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from treadle.errors import CorruptWeights, ModelNotFound, UnsupportedModel

MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_NAME_BYTES = 1 << 16
MAX_DIMS = 4

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# GGUF value type to struct and numpy format.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """Elements come in blocks of `block` along the last dimension, each stored in `size` bytes."""

    name: str
    block: int
    size: int


TENSOR_TYPES: Mapping[int, TensorType] = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    30: TensorType("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """shape: outermost first (GGUF writes it innermost first). offset: of the first byte in the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _ArrayRef:
    """An array in the file: its elements begin at `offset`."""

    kind: int
    count: int
    offset: int


Scalar = bool | int | float | str


class GGUFFile:
    """A parsed header over a mapped file. Raises ModelNotFound, CorruptWeights or UnsupportedModel when made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24:
                    raise CorruptWeights(f"{path}: {self.size} bytes are too few for a GGUF file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelNotFound(f"{path}: {error.strerror}") from error
        cursor = _Cursor(self._map, str(path))
        self._values, self.tensors = _parse(cursor)
        self.header_bytes = cursor.offset

    def get(self, key: str) -> Scalar | None:
        """A scalar of the metadata; None where there is none, or where it is an array."""
        value = self._values.get(key)
        return None if isinstance(value, _ArrayRef) else value

    def is_array(self, key: str) -> bool:
        return isinstance(self._values.get(key), _ArrayRef)

    def array_length(self, key: str) -> int:
        value = self._values.get(key)
        return value.count if isinstance(value, _ArrayRef) else 0

    def scalars(self) -> dict[str, Scalar]:
        """All the metadata that is not an array."""
        return {key: value for key, value in self._values.items() if not isinstance(value, _ArrayRef)}

    def strings(self, key: str) -> list[str]:
        """An array of strings; bytes that are not UTF-8 are replaced. Raises CorruptWeights when it is not there."""
        ref = self._ref(key)
        if ref.kind != _STRING:
            raise CorruptWeights(f"{self.path}: {key} is not an array of strings")
        data, offset, result = self._map, ref.offset, []
        unpack = _U64.unpack_from
        for _ in range(ref.count):
            end = offset + 8 + unpack(data, offset)[0]
            result.append(data[offset + 8 : end].decode("utf-8", "replace"))
            offset = end
        return result

    def numbers(self, key: str) -> npt.NDArray[np.generic]:
        """An array of numbers, as a read-only view. Raises CorruptWeights when it is not there."""
        ref = self._ref(key)
        if ref.kind not in _SCALARS:
            raise CorruptWeights(f"{self.path}: {key} is not an array of numbers")
        return np.frombuffer(self._map, dtype=_SCALARS[ref.kind], count=ref.count, offset=ref.offset)

    def data(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, [rows, bytes per row], a read-only view of the file."""
        flat = np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
        return flat.reshape(rows, tensor.nbytes // rows)

    def header(self) -> bytes:
        """Everything before the tensor data: metadata and the table of tensors."""
        return self._map[: self.header_bytes]

    def _ref(self, key: str) -> _ArrayRef:
        value = self._values.get(key)
        if not isinstance(value, _ArrayRef):
            raise CorruptWeights(f"{self.path}: the array {key} is missing")
        return value


class _Cursor:
    """Reads forward, and refuses to read past the end or to believe a count that the file cannot hold."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data = data
        self.size = len(data)
        self.offset = 0
        self.where = where

    def fail(self, message: str) -> CorruptWeights:
        return CorruptWeights(f"{self.where}: {message} (at byte {self.offset})")

    def take(self, form: struct.Struct) -> int:
        return int(self.scalar(form))

    def scalar(self, form: struct.Struct) -> bool | int | float:
        if self.offset + form.size > self.size:
            raise self.fail("the file ends inside its header")
        value: bool | int | float = form.unpack_from(self.data, self.offset)[0]
        self.offset += form.size
        return value

    def string(self, limit: int) -> str:
        length = self.take(_U64)
        if length > limit or self.offset + length > self.size:
            raise self.fail(f"a string of {length} bytes, at most {min(limit, self.size - self.offset)} are possible")
        text = self.data[self.offset : self.offset + length]
        self.offset += length
        return text.decode("utf-8", "replace")

    def array(self) -> _ArrayRef:
        kind, count = self.take(_U32), self.take(_U64)
        start = self.offset
        if kind == _STRING:
            self._skip_strings(count)
        elif kind in _SCALARS:
            length = count * struct.calcsize(_SCALARS[kind])
            if length > self.size - start:
                raise self.fail(f"an array of {count} numbers does not fit into the file")
            self.offset = start + length
        else:
            raise self.fail(f"an array of value type {kind}, expected numbers or strings")
        return _ArrayRef(kind, count, start)

    def _skip_strings(self, count: int) -> None:
        data, size, offset, unpack = self.data, self.size, self.offset, _U64.unpack_from
        if count > (size - offset) // 8:
            raise self.fail(f"an array of {count} strings does not fit into the file")
        for _ in range(count):
            if offset + 8 > size:
                raise self.fail("the file ends inside an array of strings")
            offset += 8 + unpack(data, offset)[0]
        if offset > size:
            raise self.fail("the file ends inside an array of strings")
        self.offset = offset


def _parse(cursor: _Cursor) -> tuple[dict[str, Scalar | _ArrayRef], dict[str, TensorInfo]]:
    if cursor.data[:4] != b"GGUF":
        raise cursor.fail("not a GGUF file: it does not begin with 'GGUF'")
    cursor.offset = 4
    version = cursor.take(_U32)
    if version not in (2, 3):
        raise UnsupportedModel(f"{cursor.where}: GGUF version {version} is not supported; versions 2 and 3 are")
    tensor_count, key_count = cursor.take(_U64), cursor.take(_U64)
    if key_count > MAX_KEYS or tensor_count > MAX_TENSORS:
        raise cursor.fail(
            f"{key_count} keys and {tensor_count} tensors; at most {MAX_KEYS} and {MAX_TENSORS} are allowed"
        )
    values: dict[str, Scalar | _ArrayRef] = {}
    for _ in range(key_count):
        key = cursor.string(MAX_NAME_BYTES)
        if key in values:
            raise cursor.fail(f"the key {key!r} appears twice")
        values[key] = _value(cursor)
    if values.get("split.count", 1) not in (0, 1):
        raise UnsupportedModel(f"{cursor.where}: a GGUF in several files is not supported; merge it into one")
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment is {alignment!r}, expected a power of two")
    base = -(-cursor.offset // alignment) * alignment
    return values, _tensor_table(cursor, entries, base)


def _value(cursor: _Cursor) -> Scalar | _ArrayRef:
    kind = cursor.take(_U32)
    if kind == _STRING:
        return cursor.string(cursor.size)
    if kind == _ARRAY:
        return cursor.array()
    if kind not in _SCALARS:
        raise cursor.fail(f"unknown value type {kind}")
    return cursor.scalar(struct.Struct(_SCALARS[kind]))


def _tensor_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(MAX_NAME_BYTES)
    dims = cursor.take(_U32)
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name!r} has {dims} dimensions, expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.take(_U64) for _ in range(dims))[::-1]
    return name, shape, cursor.take(_U32), cursor.take(_U64)


def _tensor_table(
    cursor: _Cursor, entries: list[tuple[str, tuple[int, ...], int, int]], base: int
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        form = TENSOR_TYPES.get(kind)
        if form is None:
            allowed = ", ".join(known.name for known in TENSOR_TYPES.values())
            raise UnsupportedModel(f"{cursor.where}: {name} is stored as GGML type {kind}; supported are {allowed}")
        elements = 1
        for length in shape:
            elements *= length
        if elements == 0 or shape[-1] % form.block:
            raise CorruptWeights(f"{cursor.where}: {name} {list(shape)} does not divide into {form.name} blocks")
        nbytes = elements // form.block * form.size
        if base + offset + nbytes > cursor.size:
            raise CorruptWeights(
                f"{cursor.where}: {name} needs bytes {base + offset} to {base + offset + nbytes}, "
                f"but the file has {cursor.size}: it is truncated or corrupt"
            )
        if name in tensors:
            raise CorruptWeights(f"{cursor.where}: the tensor {name!r} appears twice")
        tensors[name] = TensorInfo(name, shape, form, base + offset, nbytes)
    return tensors
