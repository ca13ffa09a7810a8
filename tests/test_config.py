"""Model descriptions: read from every layout, refused when unsupported, named when corrupt."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.ggufkit import write_gguf
from tests.modelkit import FAMILIES, make_checkpoint
from tests.vocabulary import EOS
from treadle.engine.config import RopeScaling, load_config
from treadle.engine.config_gguf import llama3_divisors
from treadle.errors import CorruptWeights, ModelNotFound, UnsupportedModel

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _write(directory: Path, **fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(LLAMA | fields))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_families_as_transformers_writes_them(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_checkpoint(tmp_path / family, family, tied=tied)
    config = load_config(path)
    assert config == load_config(path / "config.json")
    assert config.architecture == ("llama" if family == "llama3" else family)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (6, 3, 32 if family == "qwen3" else 16)
    assert config.tie_embeddings is tied
    assert config.attention_bias is (family == "qwen2")
    assert not config.output_bias
    assert config.qk_norm is (family == "qwen3")
    assert config.rope_scaling == (RopeScaling("llama3", 8.0, 1.0, 4.0, 64) if family == "llama3" else None)
    assert config.sliding_window is None
    assert (config.bos_token_id, config.eos_token_ids) == (256, (EOS,))


def test_silence_means_what_transformers_assumes(tmp_path: Path) -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        heads = {"num_attention_heads": 32, "hidden_size": 4096}
        config = load_config(_write(tmp_path, **heads, model_type=family, architectures=None))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert config.num_kv_heads == theirs.num_key_value_heads
        assert config.max_position == theirs.max_position_embeddings
        assert config.head_dim == getattr(theirs, "head_dim", None) or 4096 // 32
        assert config.rms_norm_eps == theirs.rms_norm_eps
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.tie_embeddings is theirs.tie_word_embeddings
        assert config.sliding_window == getattr(theirs, "sliding_window", None)


def test_old_and_new_rope_fields(tmp_path: Path) -> None:
    old = load_config(_write(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3_ROPE))
    new = load_config(_write(tmp_path, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}))
    assert old == new
    assert (new.rope_theta, new.rope_scaling) == (5e5, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))
    linear = load_config(_write(tmp_path, rope_scaling={"type": "linear", "factor": 2}))
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


def test_generation_config_decides_where_text_ends(tmp_path: Path) -> None:
    _write(tmp_path, eos_token_id=2)
    assert load_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 3, 7, -1, 99999]}')
    assert load_config(tmp_path).eos_token_ids == (7, 3)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_config(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 4096}, None),
        ({"model_type": "qwen2", "sliding_window": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        ({"model_type": "llama", "sliding_window": 64}, None),
    ],
)
def test_sliding_windows(tmp_path: Path, fields: dict[str, Any], window: int | None) -> None:
    assert load_config(_write(tmp_path, num_key_value_heads=3, **fields)).sliding_window == window


def test_windows_on_some_layers_only_are_refused(tmp_path: Path) -> None:
    mixed = {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1, "num_key_value_heads": 3}
    with pytest.raises(UnsupportedModel, match="one window for all layers"):
        load_config(_write(tmp_path, model_type="qwen2", **mixed))
    types = ["sliding_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="one window for all layers"):
        load_config(_write(tmp_path, model_type="qwen2", **mixed | {"layer_types": types}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, r"'gpt2' is not supported; supported are llama, mistral, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with 'awq'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported; supported are default"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_we_cannot_run_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        load_config(_write(tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_size": "96"}, "hidden_size is '96', expected an integer"),
        ({"hidden_size": 0}, "hidden_size is 0, expected 1 to"),
        ({"num_hidden_layers": 10**12}, "num_layers is 1000000000000, expected 1 to"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected an integer"),
        ({"num_key_value_heads": 4}, "6 heads do not divide by 4 KV heads"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": "nan"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "must be positive"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_scaling": 3}, "rope_scaling is 3, expected a mapping"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "positive factor"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor above"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"architectures": "Llama"}, "a list of strings"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptWeights, match=message):
        load_config(_write(tmp_path, **fields))


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100000, '{"hidden_size": NaN}'])
def test_config_that_is_not_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CorruptWeights, match=r"config\.json"):
        load_config(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / "none.gguf"):
        with pytest.raises(ModelNotFound, match="expected a directory with config"):
            load_config(path)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_says_the_same_as_config_json(tmp_path: Path, family: str, tied: bool) -> None:
    checkpoint = make_checkpoint(tmp_path / "hf", family, tied=tied)
    expected = load_config(checkpoint)
    found = load_config(write_gguf(checkpoint, tmp_path / "model.gguf"))
    assert found.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    assert dataclasses.replace(found, rms_norm_eps=0.0) == dataclasses.replace(
        expected, rms_norm_eps=0.0, bos_token_id=None, architecture="llama" if family == "mistral" else family
    )


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"general__architecture": "gemma"}, UnsupportedModel, "'gemma' is not supported; supported are llama"),
        ({"llama__expert_count": 8}, UnsupportedModel, "mixture-of-experts"),
        ({"llama__rope__scaling__type": "yarn"}, UnsupportedModel, "'yarn' is not supported"),
        ({"llama__rope__dimension_count": 8}, UnsupportedModel, "differs from the head size 16"),
    ],
)
def test_gguf_that_we_cannot_run(
    tmp_path: Path, extra: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The writer refuses to write a key twice with other values; later ones win here.
    monkeypatch.setattr(gguf.GGUFWriter, "add_architecture", lambda self: None)
    extra = {"general__architecture": "llama"} | extra
    path = write_gguf(make_checkpoint(tmp_path / "hf", "mistral"), tmp_path / "model.gguf", **extra)
    with pytest.raises(error, match=message):
        load_config(path)


def test_llama3_divisors_are_those_of_transformers(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    config = transformers.AutoConfig.from_pretrained(make_checkpoint(tmp_path / "hf", "llama3"))
    frequencies, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert np.allclose(plain / llama3_divisors(scaling, 16, 10000.0), frequencies.numpy(), rtol=1e-6)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rope_factors_become_llama3_scaling(tmp_path: Path, factor: float) -> None:
    scaling = RopeScaling("llama3", factor)
    divisors = llama3_divisors(scaling, 128, 5e5).astype(np.float32)
    assert load_config(_rope_file(tmp_path / "good.gguf", divisors)).rope_scaling == scaling
    assert load_config(_rope_file(tmp_path / "none.gguf", np.ones(64, np.float32))).rope_scaling is None
    with pytest.raises(UnsupportedModel, match="not Llama 3's scaling"):
        load_config(_rope_file(tmp_path / "other.gguf", divisors[::-1].copy()))
    with pytest.raises(CorruptWeights, match=r"rope_freqs\.weight"):
        load_config(_rope_file(tmp_path / "short.gguf", divisors[:10].copy()))


def _rope_file(path: Path, factors: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(131072)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(2)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(320)
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
