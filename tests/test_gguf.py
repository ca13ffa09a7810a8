"""The GGUF container: what it holds, and that no file can make it believe nonsense."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ggufkit import write_gguf, write_vocabulary
from tests.modelkit import make_checkpoint
from treadle.engine.gguf import TENSOR_TYPES, GGUFFile
from treadle.errors import CorruptWeights, ModelError, ModelNotFound, UnsupportedModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf")
    return write_gguf(make_checkpoint(directory / "hf", "llama3"), directory / "model.gguf", "Q8_0")


def _header(*, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _parse(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return GGUFFile(path)


def test_agrees_with_the_reference_reader(model: Path) -> None:
    ours, theirs = GGUFFile(model), gguf.GGUFReader(model)
    assert len(ours.tensors) == len(theirs.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (info.type.name, info.offset, info.nbytes) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        assert np.array_equal(ours.data(info).reshape(-1), tensor.data.reshape(-1).view(np.uint8))
    for key, value in ours.scalars().items():
        assert theirs.fields[key].contents() == value


def test_type_table_agrees_with_the_reference() -> None:
    for number, form in TENSOR_TYPES.items():
        kind = gguf.GGMLQuantizationType[form.name]
        assert kind.value == number
        assert gguf.GGML_QUANT_SIZES[kind] == (form.block, form.size)


def test_arrays(tmp_path: Path) -> None:
    tokens = ["a", "", "ü😀", "d" * 1000]
    path = write_vocabulary(tmp_path / "v.gguf", tokens, model="gpt2", scores=[0.5, -1.0, 2.0, 3.0], merges=["a b"])
    file = GGUFFile(path)
    assert file.strings("tokenizer.ggml.tokens") == tokens
    assert file.numbers("tokenizer.ggml.scores").tolist() == [0.5, -1.0, 2.0, 3.0]
    assert file.array_length("tokenizer.ggml.tokens") == 4
    assert file.get("tokenizer.ggml.tokens") is None
    with pytest.raises(CorruptWeights, match="not an array of numbers"):
        file.numbers("tokenizer.ggml.tokens")
    with pytest.raises(CorruptWeights, match=r"nothing\.here is missing"):
        file.strings("nothing.here")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        GGUFFile(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"PK\3\4" + bytes(60), "not a GGUF file"),
        (_header(keys=1 << 60), "keys"),
        (_header(tensors=1 << 60), "tensors"),
        (_header(keys=1) + struct.pack("<Q", 1 << 62), "a string of"),
        (_header(keys=1) + _string(b"k") + struct.pack("<I", 77), "unknown value type 77"),
        (_header(keys=1) + _string(b"k") + struct.pack("<IIQ", 9, 8, 1 << 61), "strings does not fit"),
        (_header(keys=1) + _string(b"k") + struct.pack("<IIQ", 9, 4, 1 << 61), "numbers does not fit"),
        (_header(keys=1) + _string(b"k") + struct.pack("<IIQ", 9, 9, 1), "value type 9"),
        (_header(keys=1) + _string(b"k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 60), "ends inside an array"),
        (_header(keys=2) + (_string(b"k") + struct.pack("<II", 4, 1)) * 2, "appears twice"),
        (_header(keys=1) + _string(b"general.alignment") + struct.pack("<II", 4, 3), "power of two"),
        (_header(tensors=1) + _string(b"t") + struct.pack("<I", 99), "99 dimensions"),
        (_header(tensors=1) + _string(b"t") + struct.pack("<IQIQ", 1, 31, 8, 0), "Q8_0 blocks"),
        (_header(tensors=1) + _string(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0), "does not divide"),
        (_header(tensors=1) + _string(b"t") + struct.pack("<IQIQ", 1, 1 << 50, 0, 0), "truncated or corrupt"),
        (_header(tensors=1) + _string(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1 << 63), "truncated or corrupt"),
    ],
)
def test_nonsense_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CorruptWeights, match=message):
        _parse(tmp_path / "bad.gguf", data)


def test_unsupported_versions_and_types(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="version 1 is not supported"):
        _parse(tmp_path / "old.gguf", _header(version=1))
    iq = _header(tensors=1) + _string(b"blk.0.w") + struct.pack("<IQIQ", 1, 256, 16, 0)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.w is stored as GGML type 16; supported are F32"):
        _parse(tmp_path / "iq.gguf", iq)
    split = _header(keys=1) + _string(b"split.count") + struct.pack("<IH", 2, 4)
    with pytest.raises(UnsupportedModel, match="several files"):
        _parse(tmp_path / "split.gguf", split)


def test_every_truncation_is_noticed(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    header = GGUFFile(model).header_bytes
    for length in [*range(0, header, 37), header, len(data) // 2, len(data) - 64]:
        with pytest.raises(CorruptWeights):
            _parse(tmp_path / "short.gguf", data[:length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_give_a_typed_error_or_a_file(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original = model.read_bytes()
    header = bytearray(original[: GGUFFile(model).header_bytes])
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    try:
        file = _parse(path, bytes(header) + original[len(header) :])
    except ModelError:
        return
    for tensor in file.tensors.values():
        file.data(tensor)


def test_a_large_vocabulary_parses_quickly(tmp_path: Path) -> None:
    tokens = [f"token{index}" for index in range(49152)]
    merges = [f"a{index} b" for index in range(48900)]
    path = write_vocabulary(tmp_path / "big.gguf", tokens, model="gpt2", merges=merges)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        GGUFFile(path)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3
