"""Weights from safetensors files, one or many with an index."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from treadle.engine.config import ModelConfig
from treadle.errors import CorruptWeights, ModelNotFound, UnsupportedModel

from .source import Shape, check_shape, check_slice, expected_shapes
from .upload import Upload

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_HEADER = 100 << 20
_SAMPLES = 16
_SAMPLE_BYTES = 256


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor is. offset: of its first byte in `file`."""

    file: Path
    shape: Shape
    dtype: str
    offset: int
    nbytes: int


class SafetensorsSource:
    """A `WeightSource` that reads onto `device`.

    Raises CorruptWeights at once when a tensor or file is missing, short, or has another shape.
    """

    def __init__(self, directory: Path, config: ModelConfig, device: torch.device | None = None) -> None:
        self._upload = None if device is None or device.type == "cpu" else Upload(device)
        self._directory = directory
        self._config = config
        files = _files(directory)
        self._entries: dict[str, _Entry] = {}
        for file in files:
            self._entries |= _read_header(file)
        for name, shape in expected_shapes(config).items():
            entry = self._entry(name)
            check_shape(entry.file, name, entry.shape, shape)
            if entry.dtype not in _FLOATS:
                raise UnsupportedModel(
                    f"{entry.file}: {name} is stored as {entry.dtype}; supported are {', '.join(_FLOATS)}"
                )
        self._open = {file: _open(file) for file in files}

    def has(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> Shape:
        return self._entry(name).shape

    def read(
        self, name: str, dtype: torch.dtype, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        entry = self._entry(name)
        stop = check_slice(name, entry.shape, dim, start, stop)
        try:
            stored = self._open[entry.file].get_slice(name)
            part: torch.Tensor = stored[start:stop] if dim == 0 else stored[:, start:stop]
        except SafetensorError as error:
            raise CorruptWeights(f"{entry.file}: {name}: {error}") from error
        if self._upload is not None:
            return self._upload(part, dtype)
        # A copy in any case: what safetensors returns may be a view of the mapped file.
        return torch.empty(part.shape, dtype=dtype).copy_(part)

    def blocks(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> None:
        return None

    def fingerprint(self) -> str:
        """Hash of the config, all names, shapes, dtypes and places, and bytes out of the middle of some tensors."""
        digest = hashlib.sha256(repr(self._config).encode())
        names = sorted(self._entries)
        for name in names:
            entry = self._entries[name]
            digest.update(f"{name} {entry.shape} {entry.dtype} {entry.file.name} {entry.offset}\n".encode())
        for name in names[:: max(len(names) // _SAMPLES, 1)]:
            entry = self._entries[name]
            with entry.file.open("rb") as file:
                file.seek(entry.offset + entry.nbytes // 2)
                digest.update(file.read(min(_SAMPLE_BYTES, entry.nbytes - entry.nbytes // 2)))
        return digest.hexdigest()

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            expected = expected_shapes(self._config).get(name)
            raise CorruptWeights(f"{self._directory}: the tensor {name} is missing, expected shape {expected}")
        return entry


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    single = directory / _SINGLE
    if not index.is_file():
        if not single.is_file():
            raise ModelNotFound(f"no weights in {directory}: expected {_SINGLE} or {_INDEX}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptWeights(f"{index}: expected a JSON object with a weight_map: {error!r}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptWeights(f"{index}: {name!r} is not the name of a file in the same directory")
        if not (directory / name).is_file():
            raise CorruptWeights(f"{index}: names {name}, which is missing; {len(names)} files are expected")
    return [directory / name for name in names]


def _read_header(path: Path) -> dict[str, _Entry]:
    """The table of contents: 8 bytes of length, then JSON (https://huggingface.co/docs/safetensors)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size or length > _MAX_HEADER:
            raise CorruptWeights(
                f"{path}: a header of {length} bytes in a file of {size}: truncated or not safetensors"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        if not isinstance(header, dict):
            raise TypeError("not an object")
        return {name: _entry(path, item, 8 + length, size) for name, item in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptWeights(f"{path}: its header is not that of a safetensors file: {error!r}") from error


def _entry(path: Path, item: dict[str, Any], base: int, size: int) -> _Entry:
    begin, end = item["data_offsets"]
    if not 0 <= begin <= end or base + end > size:
        raise CorruptWeights(f"{path}: data up to byte {base + end}, but the file has {size}: truncated or corrupt")
    return _Entry(path, tuple(int(length) for length in item["shape"]), str(item["dtype"]), base + begin, end - begin)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CorruptWeights(f"{path}: {error}") from error
