"""Tokenizers from every kind of file, against transformers and the tokenizers library."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from tests.ggufkit import write_vocabulary
from tests.modelkit import make_checkpoint, write_tokenizer
from tests.vocabulary import BOS, EOS, IM_END, IM_START
from treadle.errors import CorruptWeights, InvalidRequest, ModelNotFound, ProtocolError, UnsupportedModel
from treadle.models import resolve_model
from treadle.scheduler.guidance.llg import LlgMatching
from treadle.tokenizer import Tokenizer
from treadle.tokenizer_gguf import merges_from_scores

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind; it's 12345 times lazier than foxes.",
    "def fibonacci(n: int) -> int:\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Les élèves naïfs mangeaient des œufs à Noël. Größe, Straße, übermäßig. Ελληνικά και русский текст.",
    "Preise: 3,50 € und 1 000 000 ¥; x² + y² = z²; ½ + ¾; ①②③.",
] * 4
TEXTS = [
    "",
    " ",
    "Hello world",
    "Hello, world! How's it going?",
    "  leading and   inner   spaces  ",
    "tabs\tand\nnewlines\r\n\r\nmixed \n \n",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]  # squares",
    "Größe naïve œuvre Ελληνικά русский עברית العربية हिन्दी ไทย",
    "日本語のテキストと中文字符 한국어",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 emoji e\u0301 combining Å ﬁ",
    "12345678 3.14159 1,000,000 0x1F",
    "<|im_start|>user\nWhat is <|im_end|> for?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nüñí<|im_end|>",
    "\u0000\u0001\u007f\ufffd\u200b\u2028",
    "a" * 5000,
]
# transformers cuts text for this vocabulary without setting digits apart, although the file asks for it.
TEXTS_WITH_SPACED_DIGITS = ["Steps:\n\n1. one\n\n2. two", "x =  12", "\t\t7 and \n 8"]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return resolve_model("smollm2-135m")
    except ModelNotFound as error:
        pytest.skip(f"needs the model: {error}")


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.load(smollm2)


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)


@pytest.fixture(scope="module")
def corrected(oracle: Any) -> tokenizers.Tokenizer:
    """The same, cut as the vocabulary was trained: digits one by one, then GPT-2's expression."""
    backend = tokenizers.Tokenizer.from_str(oracle.backend_tokenizer.to_str())
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_the_ids_of_transformers(tokenizer: Tokenizer, oracle: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    for skip in (False, True):
        expected = oracle.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet=" \n\t123ab.,'é😀"))
def test_smollm2_on_any_text(tokenizer: Tokenizer, corrected: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == corrected.encode(text).ids
    # A few bytes of rare characters are not in this vocabulary; then some of the text is lost, in the library as here.
    assert tokenizer.decode(ids, skip_special_tokens=False) == corrected.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", TEXTS_WITH_SPACED_DIGITS)
def test_smollm2_sets_digits_apart(tokenizer: Tokenizer, oracle: Any, corrected: Any, text: str) -> None:
    assert tokenizer.encode(text) == corrected.encode(text).ids != oracle.encode(text)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_decoding_any_ids_is_that_of_the_library(
    tokenizer: Tokenizer, corrected: tokenizers.Tokenizer, ids: list[int], skip: bool
) -> None:
    assert tokenizer.decode(ids, skip_special_tokens=skip) == corrected.decode(ids, skip_special_tokens=skip)


def test_smollm2_facts(tokenizer: Tokenizer, oracle: Any) -> None:
    assert tokenizer.vocab_size == len(oracle) == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert not tokenizer.adds_bos
    assert tokenizer.decode([-1, 10**6, 1 << 40]) == ""


def test_smollm2_chat_is_that_of_transformers(tokenizer: Tokenizer, oracle: Any) -> None:
    messages = [
        {"role": "user", "content": "Tell me <|im_end|> about {{ jinja }} & <b>😀</b>"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]
    for more in ([], [{"role": "system", "content": "Be terse."}]):
        for prompt in (False, True):
            expected = oracle.apply_chat_template(more + messages, tokenize=False, add_generation_prompt=prompt)
            assert tokenizer.apply_chat_template(more + messages, add_generation_prompt=prompt) == expected
            ids = oracle.apply_chat_template(more + messages, add_generation_prompt=prompt)["input_ids"]
            assert tokenizer.encode(expected, add_special_tokens=False) == ids


def test_info_makes_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    info = tokenizer.to_info("7")
    again = Tokenizer.from_info(info)
    assert info.id == "7"
    assert again.to_info("7") == info
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "hi"}]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)


def test_info_that_is_no_tokenizer(tokenizer: Tokenizer) -> None:
    for wrong in (b"", b'{"version": "1.0"}', b"\xff"):
        with pytest.raises(ProtocolError, match="cannot be read"):
            Tokenizer.from_info(msgspec.structs.replace(tokenizer.to_info(), tokenizer_json=wrong))


def test_loads_quickly_and_without_torch(smollm2: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from treadle.tokenizer import Tokenizer\n"
        "times = []\n"
        "for _ in range(3):\n"
        "    start = time.perf_counter()\n    Tokenizer.load(Path(sys.argv[1]))\n"
        "    times.append(time.perf_counter() - start)\n"
        "bad = {'torch', 'transformers', 'jinja2'} & set(sys.modules)\n"
        "print(min(times), ','.join(sorted(bad)))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(smollm2)], capture_output=True, text=True, check=True)
    seconds, _, bad = result.stdout.strip().partition(" ")
    assert bad == ""
    assert float(seconds) < 1.0  # a fifth of a second on an idle machine


@pytest.mark.parametrize("text", [b"bytes", None, 3])
def test_what_is_not_text_is_refused(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be a string"):
        tokenizer.encode(text)


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800")


# ── Hugging Face directories ─────────────────────────────────────────────────────────────────────────────────────────


def test_directory(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_checkpoint(tmp_path, "qwen2"))
    # Not AutoTokenizer, which builds Qwen's own tokenizer around any vocabulary that lies beside a Qwen model.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [IM_START, tokenizer.encode("a")[0], IM_END]
    assert tokenizer.eos_token_ids == (EOS,)
    messages = [{"role": "user", "content": "hi"}]
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages) == expected


@pytest.mark.parametrize("stated", [None, False, True])
@pytest.mark.parametrize("template", [False, True])
def test_beginning_of_sequence_as_in_transformers(tmp_path: Path, stated: bool | None, template: bool) -> None:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"add_bos_token": stated}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template:
        backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
        backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("hi") == theirs.encode("hi")
    assert tokenizer.adds_bos is template
    assert (tokenizer.encode("hi")[0] == BOS) is template
    assert tokenizer.encode("hi", add_special_tokens=False) == theirs.encode("hi", add_special_tokens=False)
    assert tokenizer.eos_token_ids == (EOS,)


def test_where_chat_templates_are_found(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "x"}]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default {{ bos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": named}))
    assert Tokenizer.load(tmp_path).apply_chat_template(messages) == "default <|bos|>"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}")
    assert Tokenizer.load(tmp_path).apply_chat_template(messages) == "file <|eos|>"


def test_broken_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CorruptWeights, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    wordpiece = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedModel, match="decoder 'WordPiece' is not supported"):
        Tokenizer.load(tmp_path)


# ── rebuilt from GGUF metadata ───────────────────────────────────────────────────────────────────────────────────────


def _trained_byte_level() -> tuple[list[str], list[str]]:
    """Tokens in the order of their ids, and merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    vocab = backend.get_vocab()
    merges = json.loads(backend.to_str())["model"]["merges"]
    return sorted(vocab, key=vocab.__getitem__), [" ".join(pair) for pair in merges]


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_files_give_the_ids_of_transformers(tmp_path: Path, pre: str) -> None:
    tokens, merges = _trained_byte_level()
    tokens.append("<mark>")
    types = [3, 3, *[1] * (len(tokens) - 3), 4]
    fields = {"merges": merges, "types": types, "bos_token_id": 1, "eos_token_id": 0, "add_bos_token": pre == "qwen2"}
    path = write_vocabulary(tmp_path / "v.gguf", tokens, model="gpt2", pre=pre, **fields)
    ours = Tokenizer.load(path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert ours.adds_bos is (pre == "qwen2")
    for text in [*TEXTS, *CORPUS, *TEXTS_WITH_SPACED_DIGITS, "<|start|>a<mark>b<|end|>"]:
        # Qwen's own tokenizer composes characters first; the one that transformers makes of a file does not.
        given = normalizers.NFC().normalize_str(text) if pre == "qwen2" else text
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(given, add_special_tokens=False)
        assert ours.decode(ours.encode(text), skip_special_tokens=False).endswith(given)
    assert ours.eos_token_ids == (0,)


def _sentencepiece_vocabulary() -> tuple[list[str], list[float]]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    merged = ["".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    chars = sorted({char for text in CORPUS for char in text.replace(" ", "▁")} - {"\n"})
    pieces = list(dict.fromkeys(merged)) + chars
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *pieces]
    return tokens, [0.0] * 259 + [-float(index) for index in range(len(pieces))]


def _by_definition(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece's BPE as its paper says it: merge the adjacent pair with the best score, leftmost first."""
    vocab = {token: index for index, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(-scores[vocab[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in vocab]
        if not pairs:
            break
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = [[vocab[part]] if part in vocab else [3 + byte for byte in part.encode()] for part in parts]
    return [id for part in ids for id in part]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any, list[str], list[float]]:
    directory = tmp_path_factory.mktemp("spm")
    tokens, scores = _sentencepiece_vocabulary()
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    path = write_vocabulary(directory / "v.gguf", tokens, model="llama", scores=scores, types=types, **ids)
    theirs = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=path.name)
    return Tokenizer.load(path), theirs, tokens, scores


def test_sentencepiece_gives_the_ids_of_transformers(sentencepiece: tuple[Tokenizer, Any, Any, Any]) -> None:
    ours, theirs, *_ = sentencepiece
    assert ours.adds_bos
    assert ours.eos_token_ids == (2,)
    for text in [*TEXTS[2:4], *TEXTS[5:], *CORPUS]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


def test_llguidance_has_the_bytes_of_its_pieces(sentencepiece: tuple[Tokenizer, Any, Any, Any]) -> None:
    ours, _, tokens, _ = sentencepiece
    theirs = LlgMatching(ours.to_info().tokenizer_json.decode(), len(tokens), ours.eos_token_ids)._tokenizer
    pieces = [ours.pieces.piece(token, False) for token in range(len(tokens))]
    assert [theirs.decode_bytes([token]) or b"\xff" for token in range(len(tokens))] == pieces


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.sampled_from([*CORPUS[0].split(), " ", "  ", "é", "日", "\n", "doglazy", "thethe"])).map("".join)
)
def test_sentencepiece_by_definition(sentencepiece: tuple[Tokenizer, Any, Any, Any], text: str) -> None:
    ours, _, tokens, scores = sentencepiece
    assert ours.encode(text, add_special_tokens=False) == _by_definition(text, tokens, scores)
    assert ours.decode(ours.encode(text)) == text


def test_merges_follow_scores() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "abb": 3, "bb": 4}
    assert merges_from_scores(vocab, [0.0, 0.0, -3.0, -1.0, -2.0]) == [("a", "bb"), ("ab", "b"), ("b", "b"), ("a", "b")]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "t5"}, UnsupportedModel, "'t5' is not supported; supported are 'gpt2' and 'llama'"),
        ({"model": "gpt2", "pre": "odd", "merges": ["a b"]}, UnsupportedModel, "'odd' is not supported; supported are"),
        ({"model": "gpt2", "merges": ["ab"]}, CorruptWeights, "expected two tokens"),
        ({"model": "gpt2", "merges": ["a c"]}, CorruptWeights, "cannot be rebuilt"),
        ({"model": "gpt2"}, CorruptWeights, "merges is missing"),
        ({"model": "llama"}, CorruptWeights, "scores is missing"),
        ({"model": "llama", "scores": [0.0]}, CorruptWeights, "1 token scores for 3 tokens"),
        ({"model": "gpt2", "merges": ["a b"], "types": [1]}, CorruptWeights, "cannot be rebuilt"),
    ],
)
def test_vocabularies_that_cannot_be(
    tmp_path: Path, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", ["a", "b", "ab"], **fields)
    with pytest.raises(error, match=message):
        Tokenizer.load(path)


def test_encoding_is_not_quadratic(tokenizer: Tokenizer) -> None:
    start = time.perf_counter()
    assert len(tokenizer.encode("word " * 50_000)) >= 50_000
    assert time.perf_counter() - start < 5
