"""Linear layers: every product there is gives x W^T + b, rounded once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.enginekit import make_rig, tokens_of
from tests.ggufkit import random_blocks, write_gguf
from tests.modelkit import make_checkpoint
from treadle.engine.comm import SingleComm
from treadle.engine.gguf import TENSOR_TYPES
from treadle.engine.linear import (
    BlocksLinear,
    Linear,
    NativeLinear,
    Placement,
    TorchLinear,
    make_gated,
    make_linear,
    usable_blocks,
)
from treadle.engine.native import Native, build, load_native
from treadle.engine.weights import StoredBlocks
from treadle.engine.weights.dequantize import dequantize
from treadle.engine.weights.gguf import GGUFSource

# Outputs below, at and above a panel of 32, rows around a tile of 12 and a chunk of 96.
SHAPES = [(1, 2), (2, 6), (31, 64), (32, 576), (33, 96), (320, 34)]
ROWS = [1, 2, 11, 12, 13, 32, 96, 97, 200]
CPU = torch.device("cpu")
FORMS = {form.name: form for form in TENSOR_TYPES.values()}
BLOCK_KINDS = ["Q4_0", "Q4_1", "Q8_0"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def native() -> Iterator[Native]:
    """Compiled as for a processor without matrix tiles (AMX): with them, these products are left to oneDNN."""
    library = load_native()
    with pytest.MonkeyPatch.context() as patch:
        if library is not None and not library.linear_elements(2, 2):
            patch.setenv("CC", f"{os.environ.get('CC', 'cc')} -mno-amx-bf16")
            library = build.try_load()
        if library is None or not library.linear_elements(2, 2):
            pytest.skip("this processor has no products of bfloat16 vectors")
        yield library


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("out", "inputs"), SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_the_native_product_is_exact_but_for_one_rounding(native: Native, out: int, inputs: int, biased: bool) -> None:
    weight, bias = random(out, inputs, seed=1), random(out, seed=2) if biased else None
    linear = NativeLinear(weight, bias, native)
    for rows in ROWS:
        x = random(rows, inputs, seed=rows)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert relative_error(linear.wide(x), expected) < 1e-5, rows
        assert torch.equal(linear(x), linear.wide(x).bfloat16()), rows


@pytest.mark.parametrize(("out", "inputs"), [(2, 2), (62, 64), (64, 576), (66, 96), (320, 34)])
@pytest.mark.parametrize("biased", [True, False])
def test_the_gated_product_activates_the_rounded_halves(native: Native, out: int, inputs: int, biased: bool) -> None:
    weight, bias = random(out, inputs, seed=3), random(out, seed=4) if biased else None
    placement = Placement(CPU, torch.bfloat16, native=native)
    gated, plain = make_gated(weight, bias, placement), make_linear(weight, bias, placement)
    assert gated is not None
    for rows in ROWS:
        x = random(rows, inputs, seed=rows)
        gate, up = plain(x).double().chunk(2, dim=-1)
        assert relative_error(gated(x), torch.nn.functional.silu(gate) * up) < 4e-3, rows


def test_rows_may_be_slices_of_longer_ones(native: Native) -> None:
    linear = NativeLinear(random(40, 64, seed=5), None, native)
    long = random(14, 100, seed=6)
    assert torch.equal(linear(long[:, :64]), linear(long[:, :64].contiguous()))


def test_nothing_is_written_beyond_the_result(native: Native) -> None:
    """Panels and tiles are padded; the padding must not reach memory."""
    linear = NativeLinear(random(34, 64, seed=7), None, native)
    for rows in ROWS:
        memory = torch.full((rows * 34 + 64,), 7.0, dtype=torch.bfloat16)
        x = random(rows, 64, seed=8)
        linear._multiply(x, memory, 0)
        assert torch.equal(memory[: rows * 34].view(rows, 34), linear(x))
        assert bool((memory[rows * 34 :] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", [True, False])
def test_every_placement_gives_the_same_product(dtype: torch.dtype, pack: bool) -> None:
    weight, bias = torch.randn(48, 64).to(dtype), torch.randn(48).to(dtype)
    placement = Placement(CPU, dtype, pack, load_native())
    linear = make_linear(weight, bias, placement)
    assert linear.weight_bytes == weight.nbytes + bias.nbytes
    x = torch.randn(5, 64).to(dtype)
    expected = x.double() @ weight.double().T + bias.double()
    assert relative_error(linear(x), expected) < 4 * torch.finfo(dtype).eps
    assert linear.wide(x).dtype is torch.float32
    assert relative_error(linear.wide(x), expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize(("out", "inputs"), [(34, 64), (62, 576)])
def test_few_rows_read_the_blocks_and_many_their_numbers(kind: str, out: int, inputs: int) -> None:
    """As on processors with matrix tiles; others can do it, too."""
    native = load_native()
    if native is None or not native.blocks_bytes(2, 32, 0):
        pytest.skip("this processor has no products of bfloat16 vectors")
    blocks = stored(kind, out, inputs)
    weight = dequantize(blocks.data, blocks.form, torch.bfloat16).double()
    for bias in (None, random(out, seed=2)):
        linear = BlocksLinear(blocks, bias, native)
        assert linear.out_features == out and linear.weight_bytes > weight.numel() * 2
        for rows in (1, 2, native.blocks_rows, native.blocks_rows + 1, 33):
            x = random(rows, inputs, seed=rows)
            expected = x.double() @ weight.T + (0 if bias is None else bias.double())
            into = torch.empty((rows, out), dtype=torch.bfloat16)
            linear.into(x, into)
            assert linear.wide(x).dtype is torch.float32 and torch.equal(into, linear(x))
            for found in (linear(x), linear.wide(x)):
                assert relative_error(found, expected) < 4 * torch.finfo(torch.bfloat16).eps, rows


def test_what_serves_where(native: Native) -> None:
    """C for bfloat16 in one thread; the others have their libraries."""
    kinds = {
        (dtype, pack): Placement(CPU, dtype, pack, native).linears
        for dtype, pack in itertools.product((torch.bfloat16, torch.float16), (True, False))
    }
    assert kinds == {
        (torch.bfloat16, True): "native",
        (torch.bfloat16, False): "torch",
        (torch.float16, True): "torch",
        (torch.float16, False): "torch",
    }
    assert Placement(CPU, torch.bfloat16).linears != "native"
    torch.set_num_threads(2)
    assert Placement(CPU, torch.bfloat16, native=native).linears != "native"
    odd = random(4, 3, seed=9)
    assert isinstance(make_linear(odd, None, Placement(CPU, torch.float16)), TorchLinear)


def stored(kind: str, out: int, inputs: int, seed: int = 0) -> StoredBlocks:
    return StoredBlocks(random_blocks(kind, out, inputs, seed), FORMS[kind])


def both_forms(blocks: StoredBlocks, bias: Tensor | None, native: Native, gated: bool) -> tuple[Linear, Linear]:
    numbers = dequantize(blocks.data, blocks.form, torch.bfloat16)
    return NativeLinear(blocks, bias, native, gated), NativeLinear(numbers, bias, native, gated)


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize(("out", "inputs"), [(2, 32), (34, 64), (62, 576), (320, 96)])
@pytest.mark.parametrize("gated", [True, False])
def test_blocks_are_multiplied_to_the_bit_as_their_numbers(
    native: Native, kind: str, out: int, inputs: int, gated: bool
) -> None:
    """Both for few rows, which read the blocks, and for many, which read what was unpacked from them."""
    for bias in (None, random(out, seed=2)):
        found, expected = both_forms(stored(kind, out, inputs), bias, native, gated)
        for rows in [*range(1, native.blocks_rows + 2), 13, 97]:
            x = random(rows, inputs + 8, seed=rows)[:, :inputs]
            assert torch.equal(found(x), expected(x)), rows
            assert torch.equal(found.wide(x), expected.wide(x)) or gated, rows


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_every_number_a_block_can_hold(native: Native, kind: str) -> None:
    """One-hot inputs read the weights one by one: all numbers times scales and offsets from tiny to large."""
    form = FORMS[kind]
    data = np.random.default_rng(1).integers(0, 256, (64, 4, form.size), dtype=np.uint8)
    scales = np.float16([6e-8, -3.1e-5, 0.0, 1.234, -999.5, 65504])
    for offset in range(0, 4 if kind == "Q4_1" else 2, 2):
        picked = np.random.default_rng(offset).choice(scales, (64, 4, 1))
        data[:, :, offset : offset + 2] = picked.view(np.uint8)
    blocks = StoredBlocks(data.reshape(64, -1), form)
    expected = dequantize(blocks.data, form, torch.bfloat16)
    linear = NativeLinear(blocks, None, native)
    for start in range(0, 128, native.blocks_rows):
        x = torch.eye(128, dtype=torch.bfloat16)[start : start + native.blocks_rows]
        assert torch.equal(linear(x), expected.T[start : start + native.blocks_rows])


def test_few_rows_read_the_blocks_and_many_do_not(native: Native) -> None:
    linear = NativeLinear(stored("Q8_0", 32, 32), None, native)
    assert linear._blocks is not None
    few, many = random(native.blocks_rows, 32, seed=1), random(native.blocks_rows + 1, 32, seed=1)
    assert bool(linear(few).any())
    linear._packed.zero_()
    assert bool(linear(few).any())
    assert not linear(many).any()
    assert linear.weight_bytes == 2 * 32 * 32 + linear._blocks.nbytes


def test_which_blocks_are_used(native: Native) -> None:
    here = Placement(CPU, torch.bfloat16, native=native)
    one, two = stored("Q4_1", 8, 64), stored("Q4_1", 24, 64, seed=1)
    joined = usable_blocks([one, two], here)
    assert joined is not None
    assert joined.shape == (32, 64)
    assert np.array_equal(joined.data, np.concatenate((one.data, two.data)))
    assert usable_blocks([one, stored("Q4_0", 8, 64)], here) is None
    assert usable_blocks([one, None], here) is None
    assert usable_blocks([None], here) is None
    assert usable_blocks([stored("Q6_K", 8, 256)], here) is None
    for other in (
        Placement(CPU, torch.float32, native=native),
        Placement(CPU, torch.bfloat16),
        replace(here, pack=False),
    ):
        assert usable_blocks([one], other) is None


@pytest.mark.parametrize("kind", BLOCK_KINDS)
@pytest.mark.parametrize("family", ["llama3", "qwen2"])
def test_a_model_says_the_same_with_and_without_blocks(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, family: str
) -> None:
    """Rotated rows (llama), biases (qwen2), tied embeddings (both), decoded greedily after a prompt."""
    monkeypatch.setattr("treadle.engine.model.load_native", lambda: native)
    path = write_gguf(make_checkpoint(tmp_path / "hf", family, tied=True), tmp_path / "model.gguf", kind)
    rigs = [make_rig(path, SingleComm(), torch.bfloat16)]
    monkeypatch.setattr(GGUFSource, "blocks", lambda *_: None)
    rigs.append(make_rig(path, SingleComm(), torch.bfloat16))
    assert rigs[0].model.weight_bytes > rigs[1].model.weight_bytes
    said = []
    for rig in rigs:
        prompt = tokens_of(0, 20)
        logits = [rig.step([(0, 0, prompt)])]
        for position in range(20, 50):
            logits.append(rig.step([(0, position, [int(logits[-1].argmax())])]))
        said.append(torch.cat(logits))
    assert torch.equal(said[0], said[1])
