"""ModelConfig from a Hugging Face config.json, as transformers 4 and 5 write it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import CorruptWeights, UnsupportedModel

from .config import ARCHITECTURES, ModelConfig, RopeScaling
from .config_fields import Fields, checked, valid_ids

MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What transformers assumes where config.json is silent."""

    kv_heads: int | None
    max_position: int
    sliding_window: int | None = None
    head_dim: int | None = None


_DEFAULTS = {
    "llama": _Defaults(kv_heads=None, max_position=2048),
    "mistral": _Defaults(kv_heads=8, max_position=131072, sliding_window=4096),
    "qwen2": _Defaults(kv_heads=32, max_position=32768, sliding_window=4096),
    "qwen3": _Defaults(kv_heads=32, max_position=32768, sliding_window=4096, head_dim=128),
}


def config_from_json(file: Path) -> ModelConfig:
    """Reads `file` and, for the end-of-sequence ids, generation_config.json beside it."""
    values = read_json(file)
    fields = Fields(values, str(file))
    architecture = _architecture(fields)
    defaults = _DEFAULTS[architecture]
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    layers = fields.integer("num_hidden_layers")
    vocab = fields.integer("vocab_size")
    max_position = fields.integer("max_position_embeddings", defaults.max_position)
    theta, scaling = _rope(fields, max_position)
    bias = architecture == "qwen2" or (architecture in ("llama", "qwen3") and fields.flag("attention_bias", False))
    bos = valid_ids(fields.integers("bos_token_id")[:1], vocab)
    config = ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", defaults.kv_heads or heads),
        head_dim=fields.integer("head_dim", defaults.head_dim or hidden // max(heads, 1)),
        max_position=max_position,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=bias,
        output_bias=bias and architecture != "qwen2",
        mlp_bias=architecture == "llama" and fields.flag("mlp_bias", False),
        qk_norm=architecture == "qwen3",
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        sliding_window=_sliding_window(fields, values, architecture, layers, max_position),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=valid_ids(_eos_ids(fields, file), vocab),
    )
    return checked(config, str(file))


def read_json(file: Path) -> dict[str, object]:
    """A JSON object from a file of bounded size; raises CorruptWeights."""
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise CorruptWeights(f"{file}: larger than {MAX_JSON_BYTES} bytes")
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptWeights(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CorruptWeights(f"{file}: expected a JSON object")
    return values


def _architecture(fields: Fields) -> str:
    allowed = f"supported are {', '.join(ARCHITECTURES)}"
    model_type = fields.text("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModel(f"{fields.where}: model_type {model_type!r} is not supported; {allowed}")
    classes = fields.strings("architectures")
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise UnsupportedModel(f"{fields.where}: {', '.join(classes)} does not generate text; {allowed} (…ForCausalLM)")
    activation = fields.text("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"{fields.where}: hidden_act {activation!r} is not supported; only 'silu' is")
    if fields.present("quantization_config"):
        method = fields.section("quantization_config").raw("quant_method")
        raise UnsupportedModel(
            f"{fields.where}: quantized with {method!r}, which is not supported; "
            "use an unquantized checkpoint or a GGUF file"
        )
    return model_type


def _rope(fields: Fields, max_position: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    section = fields.section("rope_parameters" if fields.present("rope_parameters") else "rope_scaling")
    theta = section.number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = section.text("rope_type", section.text("type", "default"))
    for where in (section, fields):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel(f"{fields.where}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", section.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind,
            section.number("factor"),
            section.number("low_freq_factor"),
            section.number("high_freq_factor"),
            section.integer("original_max_position_embeddings", max_position),
        )
    raise UnsupportedModel(
        f"{fields.where}: rope type {kind!r} is not supported; supported are default, linear and llama3"
    )


def _sliding_window(
    fields: Fields, values: dict[str, object], architecture: str, layers: int, max_position: int
) -> int | None:
    """The window where it changes anything: None when every query sees its whole context anyway."""
    if architecture == "llama":
        return None
    if architecture == "mistral":
        # An explicit null is "no window"; only silence means transformers' default.
        if "sliding_window" in values and values["sliding_window"] is None:
            return None
    elif not fields.flag("use_sliding_window", False):
        return None
    window = fields.integer("sliding_window", _DEFAULTS[architecture].sliding_window)
    if window < 1:
        raise CorruptWeights(f"{fields.where}: sliding_window is {window}, expected at least 1")
    first = 0 if architecture == "mistral" else fields.integer("max_window_layers", 28)
    kinds = fields.strings("layer_types") or [
        "sliding_attention" if index >= first else "full_attention" for index in range(min(layers, 1 << 12))
    ]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UnsupportedModel(
            f"{fields.where}: layer types {sorted(unknown)} are not supported; "
            "supported are full_attention and sliding_attention"
        )
    if "sliding_attention" not in kinds or window >= max_position:
        return None
    if "full_attention" in kinds:
        raise UnsupportedModel(
            f"{fields.where}: some layers have a sliding window of {window} and some have none; "
            "supported is one window for all layers, or none"
        )
    return window


def _eos_ids(fields: Fields, file: Path) -> tuple[int, ...]:
    """generation_config.json decides, as in transformers; chat models often list their end-of-turn token only there."""
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        ids = Fields(read_json(generation), str(generation)).integers("eos_token_id")
        if ids:
            return ids
    return fields.integers("eos_token_id")
