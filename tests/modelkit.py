"""Tiny random checkpoints in the Hugging Face layout, written by transformers, which is then also the oracle.

Every parameter is random, norms and biases too, and wide enough that logits lie far apart: an argmax means something.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .vocabulary import BOS, EOS, VOCAB_SIZE

FAMILIES = ("llama3", "mistral", "qwen2", "qwen3")
_SPECIAL = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(
    dir: Path,
    family: str,
    *,
    tied: bool = False,
    seed: int = 0,
    sliding_window: int | None = None,
    shard_size: str | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Writes config, weights, a byte-level tokenizer and a chat template to `dir` and returns it.

    family: "llama3" (with its rope scaling), "mistral", "qwen2" (biases), "qwen3" (q/k norm, head_dim of its own).
    6 query and 3 KV heads, so that 2 ranks get unequal shards. shard_size ("100KB") makes several safetensors files
    and an index. overrides: fields of the transformers config.
    """
    config = _config(family, tied, sliding_window, overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise(model)
    dir.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(dir, max_shard_size=shard_size or "5GB")
    write_tokenizer(dir)
    return dir


def load_reference(dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint, ready to run."""
    return transformers.AutoModelForCausalLM.from_pretrained(dir, dtype=dtype, attn_implementation="eager").eval()


def write_tokenizer(dir: Path) -> None:
    """A byte-level tokenizer without merges: ids 0..255 are the bytes, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer.save(str(dir / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIAL[0],
        "eos_token": _SPECIAL[1],
        "chat_template": _CHAT_TEMPLATE,
    }
    (dir / "tokenizer_config.json").write_text(json.dumps(settings))


def _config(family: str, tied: bool, sliding_window: int | None, overrides: dict[str, Any]) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": None,
    }
    if family == "llama3":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        return transformers.LlamaConfig(**common | {"head_dim": 16, "rope_parameters": rope} | overrides)
    if family == "mistral":
        return transformers.MistralConfig(**common | {"head_dim": 16, "sliding_window": sliding_window} | overrides)
    windows: dict[str, Any] = {"use_sliding_window": sliding_window is not None, "max_window_layers": 0}
    windows |= {"sliding_window": sliding_window} if sliding_window is not None else {}
    if family == "qwen2":
        return transformers.Qwen2Config(**common | windows | overrides)
    if family == "qwen3":
        return transformers.Qwen3Config(**common | windows | {"head_dim": 32} | overrides)
    raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")


def _randomise(model: Any) -> None:
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.2 / parameter.shape[1] ** 0.5)
