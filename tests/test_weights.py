"""Weights: every source gives the same tensors as the reference, whole or in slices, and says what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.ggufkit import random_blocks, write_gguf
from tests.modelkit import FAMILIES, load_reference, make_checkpoint
from treadle.engine.config import load_config
from treadle.engine.gguf import TENSOR_TYPES
from treadle.engine.weights import WeightSource, expected_shapes, open_weights
from treadle.engine.weights.dequantize import dequantize
from treadle.errors import CorruptWeights, ModelNotFound, UnsupportedModel

BLOCK_KINDS = [form.name for form in TENSOR_TYPES.values()]
# A hidden size that whole blocks of 32 divide; 6 heads of 16.
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        make_checkpoint(root / family, family)
    make_checkpoint(root / "tied", "llama3", tied=True)
    make_checkpoint(root / "sharded", "qwen2", shard_size="100KB")
    make_checkpoint(root / "biased", "llama3", attention_bias=True, mlp_bias=True)
    make_checkpoint(root / "bfloat16", "qwen3", dtype=torch.bfloat16)
    return root


def _open(path: Path) -> WeightSource:
    return open_weights(path, load_config(path))


def _check_equal(source: WeightSource, reference: dict[str, torch.Tensor], names: dict[str, tuple[int, ...]]) -> None:
    for name, shape in names.items():
        assert source.has(name)
        assert source.shape(name) == shape
        assert torch.equal(source.read(name, torch.float32), reference[name].float()), name


@pytest.mark.parametrize("name", [*FAMILIES, "tied", "sharded", "biased", "bfloat16"])
def test_safetensors_equals_transformers(checkpoints: Path, name: str) -> None:
    config = load_config(checkpoints / name)
    names = expected_shapes(config)
    reference = load_reference(checkpoints / name).state_dict()
    assert names.keys() | {"lm_head.weight"} == reference.keys()
    _check_equal(_open(checkpoints / name), reference, names)


@pytest.mark.parametrize("name", [*FAMILIES, "tied", "biased"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_gguf_equals_what_it_was_made_from(checkpoints: Path, tmp_path: Path, name: str, kind: str) -> None:
    path = write_gguf(checkpoints / name, tmp_path / "model.gguf", kind)
    form = gguf.GGMLQuantizationType[kind]
    reference = load_file(checkpoints / name / "model.safetensors")
    for key, tensor in reference.items():
        if tensor.dim() == 2:
            reference[key] = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), form), form))
    _check_equal(_open(path), reference, expected_shapes(load_config(path)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_equals_transformers(tmp_path: Path, family: str) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF files only with accelerate")
    # transformers does not read the head size of a Qwen3 file, it assumes that all have 128.
    sizes = {"head_dim": 128} if family == "qwen3" else {}
    path = write_gguf(make_checkpoint(tmp_path / "hf", family, **sizes), tmp_path / "model.gguf", "Q8_0")
    config = load_config(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    _check_equal(_open(path), model.state_dict(), expected_shapes(config))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_slices_are_slices_of_the_whole(checkpoints: Path, data: st.DataObject) -> None:
    directory = checkpoints / data.draw(st.sampled_from(["llama3", "sharded", "biased"]), label="checkpoint")
    source = data.draw(st.sampled_from(["safetensors", "gguf", "random"]), label="source")
    config = load_config(directory)
    path = directory
    if source == "gguf":
        path = directory / "q4.gguf"
        path = path if path.exists() else write_gguf(directory, path, "Q4_1")
    weights = open_weights(path, config, random=source == "random")
    name = data.draw(st.sampled_from(sorted(expected_shapes(config))))
    shape = weights.shape(name)
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim]))
    stop = data.draw(st.integers(start, shape[dim]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    part = weights.read(name, dtype, dim, start, stop)
    assert part.is_contiguous()
    assert part.dtype == dtype
    assert torch.equal(part, weights.read(name, dtype).narrow(dim, start, stop - start))


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_bit_for_bit_as_the_reference(kind: str, dtype: torch.dtype) -> None:
    form = next(form for form in TENSOR_TYPES.values() if form.name == kind)
    data = random_blocks(kind, 300, 512)
    reference = gguf.dequantize(
        data if form.block > 1 else data.view("<f2" if kind == "F16" else "<f4" if kind == "F32" else np.uint8),
        gguf.GGMLQuantizationType[kind],
    )
    ours = dequantize(data, form, dtype)
    assert ours.shape == (300, 512)
    assert torch.equal(ours, torch.from_numpy(np.array(reference, dtype=np.float32)).to(dtype))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stored_blocks_are_those_that_are_read(checkpoints: Path, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["llama3", "qwen2"]))  # with and without rows in another order
    path = checkpoints / family / "q8.gguf"
    weights = _open(path if path.exists() else write_gguf(checkpoints / family, path, "Q8_0"))
    name = data.draw(st.sampled_from(sorted(expected_shapes(load_config(path)))))
    shape = weights.shape(name)
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = st.integers(0, shape[dim] // 16).map(lambda unit: unit * 16) | st.integers(0, shape[dim])
    start, stop = sorted((data.draw(cuts), data.draw(cuts)))
    blocks = weights.blocks(name, dim, start, stop)
    step = 32 if dim == 1 else 16 if family == "llama3" and (".q_proj." in name or ".k_proj." in name) else 1
    assert (blocks is not None) == (len(shape) == 2 and start % step == stop % step == 0)
    if blocks is not None:
        numbers = weights.read(name, torch.float32, dim, start, stop)
        assert blocks.shape == numbers.shape
        assert torch.equal(dequantize(blocks.data, blocks.form, torch.float32), numbers)


def test_where_there_are_no_blocks(checkpoints: Path, tmp_path: Path) -> None:
    config = load_config(checkpoints / "llama3")
    assert open_weights(Path("nowhere"), config, random=True).blocks(Q) is None
    assert _open(checkpoints / "llama3").blocks(Q) is None
    assert _open(write_gguf(checkpoints / "llama3", tmp_path / "f16.gguf", "F16")).blocks(Q) is None


def test_what_is_read_is_the_readers_own(checkpoints: Path) -> None:
    source = _open(checkpoints / "llama3")
    before = source.read(Q, torch.float32)
    source.read(Q, torch.float32).zero_()
    assert torch.equal(source.read(Q, torch.float32), before)


def test_random_weights(checkpoints: Path) -> None:
    config = load_config(checkpoints / "qwen2")
    one, same = (open_weights(Path("nowhere"), config, random=True, seed=7) for _ in range(2))
    other = open_weights(Path("nowhere"), config, random=True, seed=8)
    embedding = one.read("model.embed_tokens.weight", torch.float32)
    assert torch.equal(embedding, same.read("model.embed_tokens.weight", torch.float32))
    assert not torch.equal(embedding, other.read("model.embed_tokens.weight", torch.float32))
    assert not torch.equal(embedding, one.read("lm_head.weight", torch.float32))
    assert embedding.std().item() == pytest.approx(0.02, rel=0.1)
    assert len(torch.unique(embedding, dim=0)) == len(embedding)
    assert torch.linalg.matrix_rank(embedding) == embedding.shape[1]
    assert torch.equal(one.read("model.norm.weight", torch.float32), torch.ones(config.hidden_size))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()


def test_fingerprints(checkpoints: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "same", "llama3")
    make_checkpoint(tmp_path / "other", "llama3", seed=1)
    first = _open(checkpoints / "llama3").fingerprint()
    assert first == _open(checkpoints / "llama3").fingerprint() == _open(tmp_path / "same").fingerprint()
    assert first != _open(tmp_path / "other").fingerprint()
    one = _open(write_gguf(tmp_path / "same", tmp_path / "one.gguf")).fingerprint()
    two = _open(write_gguf(tmp_path / "other", tmp_path / "two.gguf")).fingerprint()
    assert one != two
    assert one == _open(tmp_path / "one.gguf").fingerprint()


def _rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def _set_header(file: Path, header: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


@pytest.fixture
def victim(checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / "llama3", tmp_path / "victim"))


def test_missing_tensor_is_named(victim: Path) -> None:
    _rewrite(victim, lambda tensors: tensors.pop(Q))
    with pytest.raises(CorruptWeights, match=r"layers\.1\.self_attn\.q_proj\.weight is missing, expected .*96, 96"):
        _open(victim)


def test_wrong_shape_is_named(victim: Path) -> None:
    _rewrite(victim, lambda tensors: tensors.update({Q: torch.zeros(96, 95)}))
    with pytest.raises(CorruptWeights, match=r"q_proj\.weight has shape \[96, 95\], expected \[96, 96\]"):
        _open(victim)


def test_integer_weights_are_refused(victim: Path) -> None:
    _rewrite(victim, lambda tensors: tensors.update({Q: torch.zeros(96, 96, dtype=torch.int8)}))
    with pytest.raises(UnsupportedModel, match=r"stored as I8; supported are F64, F32, F16, BF16"):
        _open(victim)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_truncated_safetensors(victim: Path, keep: int) -> None:
    file = victim / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptWeights, match=r"model\.safetensors"):
        _open(victim)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"x": 1}',
        b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999999999]}}',
        b'{"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 0]}}',
    ],
)
def test_corrupt_safetensors_header(victim: Path, header: bytes) -> None:
    _set_header(victim / "model.safetensors", header)
    with pytest.raises(CorruptWeights, match=r"model\.safetensors"):
        _open(victim)


def test_index_problems(checkpoints: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoints / "sharded", tmp_path / "sharded"))
    (directory / "model-00002-of-00010.safetensors").unlink(missing_ok=True)
    index = directory / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if (directory / names[1]).exists():
        (directory / names[1]).unlink()
    with pytest.raises(CorruptWeights, match=f"names {names[1]}, which is missing"):
        _open(directory)
    index.write_text(json.dumps({"weight_map": {Q: "../../secret"}}))
    with pytest.raises(CorruptWeights, match="not the name of a file in the same directory"):
        _open(directory)
    index.write_text("{}")
    with pytest.raises(CorruptWeights, match="weight_map"):
        _open(directory)
    index.unlink()
    with pytest.raises(ModelNotFound, match=r"expected model\.safetensors"):
        _open(directory)


def test_gguf_with_a_missing_or_misshapen_tensor(checkpoints: Path, tmp_path: Path) -> None:
    path = write_gguf(checkpoints / "llama3", tmp_path / "model.gguf")
    more_layers = write_gguf(checkpoints / "llama3", tmp_path / "more.gguf", llama__block_count=3)
    with pytest.raises(CorruptWeights, match=r"blk\.2\.attn_norm\.weight .* is missing, expected \[96\]"):
        _open(more_layers)
    with pytest.raises(CorruptWeights, match=r"ffn_gate.*has shape \[160, 96\], expected \[192, 96\]"):
        open_weights(path, load_config(write_gguf(*_wider(tmp_path))))


def _wider(tmp_path: Path) -> tuple[Path, Path]:
    return make_checkpoint(tmp_path / "wider", "llama3", intermediate_size=192), tmp_path / "wider.gguf"


def test_slices_that_cannot_be(checkpoints: Path) -> None:
    source = _open(checkpoints / "llama3")
    for dim, start, stop in [(2, 0, 1), (0, -1, 5), (0, 5, 4), (1, 0, 97)]:
        with pytest.raises(ValueError, match="q_proj"):
            source.read(Q, torch.float32, dim, start, stop)
    with pytest.raises(CorruptWeights, match=r"no\.such\.tensor"):
        source.read("no.such.tensor", torch.float32)
