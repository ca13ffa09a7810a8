"""Which model this is: one flat description of every Llama-family decoder, from a Hugging Face config or a GGUF header.

Torch-free, so that the scheduler's side may read it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from treadle.errors import ModelNotFound

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind: "linear" divides every frequency by `factor`; "llama3" divides the low ones, keeps the high ones and blends
    between (the last three fields, as in Llama 3.1's reference code; lengths in tokens).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of a decoder. Lengths in tokens, sizes in elements.

    architecture: one of ARCHITECTURES. attention_bias: q, k and v have a bias; output_bias: o has one. qk_norm: RMS
    norm over head_dim of q and k before the rotation. sliding_window: a query sees this many keys, itself included, on
    every layer; None where it sees all.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


def load_config(path: Path) -> ModelConfig:
    """Reads a Hugging Face directory, a config.json or a .gguf file.

    Raises ModelNotFound (nothing there), UnsupportedModel (a model we cannot run; says which we can) or CorruptWeights
    (a file that is not what it claims to be).
    """
    from .config_gguf import config_from_gguf
    from .config_hf import config_from_json

    if path.is_file() and path.suffix == ".gguf":
        return config_from_gguf(path)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        return config_from_json(file)
    raise ModelNotFound(f"no model at {path}: expected a directory with config.json, a config.json or a .gguf file")
