"""A tokenizer rebuilt from the metadata of a GGUF file.

Two kinds exist in the Llama family, named by `tokenizer.ggml.model`: "gpt2", byte-level BPE, where `tokenizer.ggml.pre`
names how text is cut before merging; and "llama", SentencePiece BPE, where merges follow from the scores of the pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from treadle.engine.gguf import GGUFFile
from treadle.errors import CorruptWeights, UnsupportedModel

_CONTROL, _USER_DEFINED = 3, 4

# How each vocabulary was trained to cut text; the expressions belong to the models.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_apart() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by_regex(pattern: str) -> Callable[[], Any]:
    def make() -> Any:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


_PRE_TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _digits_apart,
    "starcoder": _digits_apart,
    "llama-bpe": _by_regex(_LLAMA3),
    "llama3": _by_regex(_LLAMA3),
    "llama-v3": _by_regex(_LLAMA3),
    "qwen2": _by_regex(_QWEN2),
    "deepseek-r1-qwen": _by_regex(_QWEN2),
}
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def read_gguf_tokenizer(path: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer`."""
    file = GGUFFile(path)
    tokens = file.strings("tokenizer.ggml.tokens")
    kind, pre = file.get("tokenizer.ggml.model"), str(file.get("tokenizer.ggml.pre") or "default")
    try:
        if kind == "gpt2":
            backend = _byte_level(file, tokens, pre)
        elif kind == "llama":
            backend = _sentencepiece(file, tokens)
        else:
            raise UnsupportedModel(f"{path}: tokenizer {kind!r} is not supported; supported are 'gpt2' and 'llama'")
        _add_special_tokens(file, backend, tokens)
    except (ValueError, TypeError, OverflowError) as error:
        raise CorruptWeights(f"{path}: its tokenizer cannot be rebuilt: {error}") from error
    bos = _token(file, tokens, "bos")
    if bos and _adds_bos(file, str(kind), pre):
        backend.post_processor = TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    template = file.get("tokenizer.chat_template")
    ends = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "backend": backend,
        "chat_template": template if isinstance(template, str) else "",
        "bos_token": bos,
        "eos_token": _token(file, tokens, "eos"),
        "eos_token_ids": tuple(dict.fromkeys(id for id in ends if isinstance(id, int) and 0 <= id < len(tokens))),
    }


def _byte_level(file: GGUFFile, tokens: list[str], pre: str) -> Any:
    make = _PRE_TOKENIZERS.get(pre)
    if make is None:
        raise UnsupportedModel(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported; supported are {', '.join(_PRE_TOKENIZERS)}"
        )
    # The separator is the first space that is not itself the left part.
    merges = [(text[: text.find(" ", 1)], text[text.find(" ", 1) + 1 :]) for text in _merges(file)]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(_bpe(vocab, merges, ignore_merges=pre in _LLAMA3_NAMES))
    if make is _PRE_TOKENIZERS["qwen2"] or pre == "deepseek-r1-qwen":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = make()
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(file: GGUFFile) -> list[str]:
    merges = file.strings("tokenizer.ggml.merges")
    for text in merges:
        if text.find(" ", 1) < 0:
            raise CorruptWeights(f"{file.path}: tokenizer.ggml.merges has {text!r:.80}, expected two tokens")
    return merges


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> Any:
    scores = file.numbers("tokenizer.ggml.scores").tolist()
    if len(scores) != len(tokens):
        raise CorruptWeights(f"{file.path}: {len(scores)} token scores for {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    unknown = _token(file, tokens, "unknown") or "<unk>"
    backend = tokenizers.Tokenizer(
        _bpe(
            vocab,
            merges_from_scores(vocab, scores),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown if unknown in vocab else None,
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix") is not False
    space = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*space, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    return backend


def merges_from_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that make each piece, best piece first: what SentencePiece's BPE does with scores, said as merges."""
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], left, right, token[:cut], token[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _bpe(vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Any:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)) from error


def _add_special_tokens(file: GGUFFile, backend: Any, tokens: list[str]) -> None:
    """Control tokens are special; user-defined ones are matched whole in a text, but stay visible."""
    if not file.is_array("tokenizer.ggml.token_type"):
        return
    kinds = file.numbers("tokenizer.ggml.token_type").tolist()
    marked = list(zip(tokens, kinds, strict=True))
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, kind in marked if kind == _CONTROL]
    )
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in marked if kind == _USER_DEFINED])


def _token(file: GGUFFile, tokens: list[str], name: str) -> str:
    id = file.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[id] if isinstance(id, int) and 0 <= id < len(tokens) else ""


def _adds_bos(file: GGUFFile, kind: str, pre: str) -> bool:
    """As the file says; older files say nothing, and then SentencePiece and Llama 3 vocabularies expect it."""
    stated = file.get("tokenizer.ggml.add_bos_token")
    return stated if isinstance(stated, bool) else kind == "llama" or pre in _LLAMA3_NAMES
