"""ModelConfig from the metadata of a GGUF file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from treadle.errors import CorruptWeights, UnsupportedModel

from .config import ARCHITECTURES, ModelConfig, RopeScaling
from .config_fields import Fields, checked, valid_ids
from .gguf import GGUFFile

# Mistral models are written as "llama", which their files then equal in every respect.
_ARCHITECTURES = tuple(name for name in ARCHITECTURES if name != "mistral")


def config_from_gguf(path: Path) -> ModelConfig:
    file = GGUFFile(path)
    scalars = Fields(file.scalars(), str(path))
    architecture = scalars.text("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModel(
            f"{path}: architecture {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    fields = _prefixed(file, architecture)
    _refuse_unsupported(file, fields, architecture)
    heads = fields.integer("attention.head_count")
    hidden = fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // max(heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(name, head_dim) != head_dim:
            raise UnsupportedModel(f"{path}: {name} {fields.integer(name)} differs from the head size {head_dim}")
    vocab = fields.integer("vocab_size", file.array_length("tokenizer.ggml.tokens"))
    theta = fields.number("rope.freq_base", 10000.0)
    bos = valid_ids(scalars.integers("tokenizer.ggml.bos_token_id"), vocab)
    ends = [scalars.integers(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position=fields.integer("context_length"),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, fields, head_dim, theta),
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        qk_norm=architecture == "qwen3",
        tie_embeddings="output.weight" not in file.tensors,
        sliding_window=None,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=valid_ids(tuple(id for ids in ends for id in ids), vocab),
    )
    return checked(config, str(path))


def _prefixed(file: GGUFFile, architecture: str) -> Fields:
    prefix = f"{architecture}."
    values = {key.removeprefix(prefix): value for key, value in file.scalars().items() if key.startswith(prefix)}
    return Fields(values, f"{file.path}: {architecture}")


def _refuse_unsupported(file: GGUFFile, fields: Fields, architecture: str) -> None:
    for name in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
        if file.is_array(f"{architecture}.{name}"):
            raise UnsupportedModel(f"{file.path}: {name} differs between layers, which is not supported")
    if fields.integer("expert_count", 0) > 0:
        raise UnsupportedModel(f"{file.path}: mixture-of-experts models are not supported")


def _rope_scaling(file: GGUFFile, fields: Fields, head_dim: int, theta: float) -> RopeScaling | None:
    if "rope_freqs.weight" in file.tensors:
        return _scaling_from_factors(file, head_dim, theta)
    kind = fields.text("rope.scaling.type", "none")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    if kind in ("none", "linear"):
        return None if factor in (0.0, 1.0) else RopeScaling("linear", factor)
    raise UnsupportedModel(
        f"{file.path}: rope scaling {kind!r} is not supported; supported are none, linear and llama3"
    )


def _scaling_from_factors(file: GGUFFile, head_dim: int, theta: float) -> RopeScaling | None:
    """GGUF keeps the divisor of each frequency, not the parameters; Llama 3 uses one set of them, so check for that."""
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
        raise CorruptWeights(f"{file.path}: rope_freqs.weight is {tensor.type.name} {list(tensor.shape)}")
    factors = file.data(tensor).view("<f4").reshape(-1).astype(np.float64)
    if np.all(factors == 1.0):
        return None
    scaling = RopeScaling("llama3", float(factors.max()))
    if not np.allclose(factors, llama3_divisors(scaling, head_dim, theta), rtol=1e-4):
        raise UnsupportedModel(f"{file.path}: rope_freqs.weight is not Llama 3's scaling, and no other is supported")
    return scaling


def llama3_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What each of the head_dim / 2 rotary frequencies is divided by (Llama 3.1's `apply_scaling`)."""
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors: np.ndarray[tuple[int], np.dtype[np.float64]] = 1.0 / ((1.0 - keep) / scaling.factor + keep)
    return divisors
