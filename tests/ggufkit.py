"""GGUF files for tests: small checkpoints rewritten, and vocabularies on their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.config import load_config
from treadle.engine.weights import expected_shapes, open_weights

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(checkpoint: Path, out: Path, kind: str = "F32", **extra: Any) -> Path:
    """The checkpoint's weights in one .gguf file, matrices stored as `kind`, as llama.cpp's converter would write them.

    A byte vocabulary goes with it. extra: scalars of the metadata, "." in keys written as "__".
    """
    config = load_config(checkpoint)
    source = open_weights(checkpoint, config)
    arch = "llama" if config.architecture == "mistral" else config.architecture
    writer = gguf.GGUFWriter(out, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_eos_token_id(config.eos_token_ids[0])
    for key, value in extra.items():
        writer.add_key_value(key.replace("__", "."), value, _value_type(value))
    for name in expected_shapes(config):
        array = source.read(name, torch.float32).numpy()
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = interleave(array, config.head_dim)
        _add(writer, _stored_name(name), array, kind if array.ndim == 2 else "F32")
    _finish(writer)
    return out


def write_vocabulary(out: Path, tokens: list[str], *, model: str, pre: str = "", **fields: Any) -> Path:
    """A file with a tokenizer and no tensors. fields: `merges`, `scores`, `types`, and scalars of tokenizer.ggml."""
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if "merges" in fields:
        writer.add_token_merges(fields.pop("merges"))
    if "scores" in fields:
        writer.add_token_scores(fields.pop("scores"))
    if "types" in fields:
        writer.add_token_types(fields.pop("types"))
    for key, value in fields.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, _value_type(value))
    _finish(writer)
    return out


def interleave(array: npt.NDArray[np.float32], head_dim: int) -> npt.NDArray[np.float32]:
    """llama.cpp's order of q and k rows: the two halves of each head, alternating."""
    heads = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2).reshape(array.shape))


def random_blocks(kind: str, rows: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Stored bytes [rows, bytes per row] of any block format: random, but with finite scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows * width // block, size), dtype=np.uint8)
    scales = {"Q6_K": [208], "Q5_1": [0, 2], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
    if kind not in ("F32", "F16", "BF16"):
        for offset in scales:
            values = random.normal(0, 0.05, len(data)).astype("<f2")
            data[:, offset : offset + 2] = values.view(np.uint8).reshape(-1, 2)
        return data.reshape(rows, -1)
    plain = random.normal(0, 1, (rows, width)).astype("<f2" if kind == "F16" else "<f4")
    return (plain if kind != "BF16" else (plain.view("<u4") >> 16).astype("<u2")).view(np.uint8)


def _stored_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{end}"
    _, _, index, rest = stem.split(".", 3)
    return f"blk.{index}.{_NAMES[rest]}.{end}"


def _add(writer: gguf.GGUFWriter, name: str, array: npt.NDArray[np.float32], kind: str) -> None:
    form = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quants.quantize(array, form), raw_dtype=form)


def _value_type(value: object) -> gguf.GGUFValueType:
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        return gguf.GGUFValueType.UINT32
    return gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.STRING


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
