"""Streamed text equals decoded text however it is cut, stop strings cut it exactly, and nothing is slow."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.ggufkit import write_vocabulary
from tests.modelkit import write_tokenizer
from treadle.errors import InvalidParameter
from treadle.text import TextStream
from treadle.tokenizer import Tokenizer

SPECIAL = 257
WORDS = ["▁", "▁the", "▁end", "end", "▁é", "日", "本", ".", "</", "s"]


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Ids 0..255 are single bytes, in an order of their own; 256.. are special."""
    directory = tmp_path_factory.mktemp("bytes")
    write_tokenizer(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *WORDS]
    types = [2, 3, 3, *[6] * 256, *[1] * len(WORDS)]
    scores = [-float(index) for index in range(len(tokens))]
    path = tmp_path_factory.mktemp("spm") / "v.gguf"
    write_vocabulary(path, tokens, model="llama", scores=scores, types=types, bos_token_id=1, eos_token_id=2)
    return Tokenizer.load(path)


def _ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """The single-byte tokens that make `data`."""
    by_piece = {tokenizer.pieces.piece(id, False): id for id in range(tokenizer.vocab_size)}
    return [by_piece[data[index : index + 1]] for index in range(len(data))]


def _run(stream: TextStream, ids: list[int], cuts: list[int]) -> str:
    """Pushes `ids` cut at `cuts` and finishes."""
    edges = [0, *sorted(cut % (len(ids) + 1) for cut in cuts), len(ids)]
    return "".join(stream.push(ids[a:b]) for a, b in pairwise(edges)) + stream.finish()


byte_ids = st.lists(st.integers(0, 259), max_size=60) | st.binary(max_size=60).map(list)
cuts = st.lists(st.integers(0, 100), max_size=8)


@settings(max_examples=300, deadline=None)
@given(ids=byte_ids, cuts=cuts, skip=st.booleans())
def test_any_grouping_gives_the_decoded_whole(by_bytes: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    stream = TextStream(by_bytes, [], skip_special_tokens=skip)
    text = _run(stream, ids, cuts)
    assert text == stream.text == by_bytes.decode(ids, skip_special_tokens=skip)
    assert text == by_bytes._backend.decode(ids, skip_special_tokens=skip)
    assert stream.tokens_used == len(ids)
    assert stream.stopped is None


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 258 + len(WORDS)), max_size=40), cuts=cuts, prompt=st.lists(st.integers(1, 268)))
def test_sentencepiece_too(sentencepiece: Tokenizer, ids: list[int], cuts: list[int], prompt: list[int]) -> None:
    text = _run(TextStream(sentencepiece, []), ids, cuts)
    assert text == sentencepiece.decode(ids)
    whole, before = sentencepiece.decode(prompt + ids), sentencepiece.decode(prompt)
    assume(not before.endswith("\ufffd"))
    assert whole == before + _run(TextStream(sentencepiece, prompt), ids, cuts)


def test_sentencepiece_drops_only_the_first_space_of_all(sentencepiece: Tokenizer) -> None:
    the = 259 + WORDS.index("▁the")
    assert TextStream(sentencepiece, []).push([1, the, the]) == "the the"
    assert TextStream(sentencepiece, [1]).push([the, the]) == "the the"
    assert TextStream(sentencepiece, [1, the]).push([the, the]) == " the the"


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=20), at=st.integers(0, 80), cuts=cuts)
def test_a_prompt_may_end_inside_a_character(by_bytes: Tokenizer, text: str, at: int, cuts: list[int]) -> None:
    data = text.encode()
    at %= len(data)
    ids = _ids(by_bytes, data)
    complete = data[:at].decode("utf-8", "ignore")
    assert complete + _run(TextStream(by_bytes, ids[:at]), ids[at:], cuts) == text


def test_text_is_held_back_until_it_is_certain(by_bytes: Tokenizer) -> None:
    stream = TextStream(by_bytes, [], stop=["</s>"])
    euro = _ids(by_bytes, "€".encode())
    assert [stream.push([id]) for id in euro] == ["", "", "€"]
    assert [stream.push([id]) for id in _ids(by_bytes, b"a<b</s!")] == ["a", "", "<b", "", "", "", "</s!"]
    assert stream.push(_ids(by_bytes, b"x</s")) == "x"
    assert stream.push(euro[:2]) == ""
    assert stream.finish() == "</s\ufffd"
    assert stream.stopped is None


def _expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """By definition: the shortest beginning of the text that ends with a stop string; of several, the longest one."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            winner = max(found, key=len)
            return text[: end if include else end - len(winner)], winner
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    text=st.text(alphabet="abé😀", max_size=40),
    stops=st.lists(st.text(alphabet="abé😀", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
    cuts=cuts,
)
def test_stop_strings_by_definition(
    by_bytes: Tokenizer, text: str, stops: list[str], include: bool, cuts: list[int]
) -> None:
    ids = _ids(by_bytes, text.encode())
    stream = TextStream(by_bytes, [], stop=stops, include_stop=include)
    expected, winner = _expected(text, stops, include)
    assert _run(stream, ids, cuts) == stream.text == expected
    assert stream.stopped == winner
    used = ids if winner is None else _ids(by_bytes, (expected if include else expected + winner).encode())
    assert stream.tokens_used == len(used)
    if winner is not None:
        assert stream.push(ids) == ""
        assert stream.tokens_used == len(used)


def test_a_stop_string_inside_one_token(sentencepiece: Tokenizer) -> None:
    stream = TextStream(sentencepiece, [1], stop=["en", "d e"])
    the, end = (259 + WORDS.index(word) for word in ("▁the", "▁end"))
    assert stream.push([the, end, the]) == "the "
    assert (stream.stopped, stream.tokens_used, stream.text) == ("en", 2, "the ")
    assert stream.finish() == ""


def test_a_stop_string_may_complete_in_the_last_flush(by_bytes: Tokenizer) -> None:
    stream = TextStream(by_bytes, [], stop=["a\ufffd"])
    assert stream.push(_ids(by_bytes, b"xa\xe2\x82")) == "x"
    assert stream.finish() == ""
    assert (stream.stopped, stream.text) == ("a\ufffd", "x")


def test_stop_strings_wait_for_min_tokens(by_bytes: Tokenizer) -> None:
    stream = TextStream(by_bytes, [], stop=["ab"], min_tokens=4)
    assert stream.push(_ids(by_bytes, b"abxabab")) == "abx"
    assert (stream.stopped, stream.tokens_used) == ("ab", 5)
    assert TextStream(by_bytes, [], stop=["ab"], min_tokens=9).push(_ids(by_bytes, b"abab")) == "abab"


def test_skipped_special_tokens_count_but_do_not_show(by_bytes: Tokenizer) -> None:
    ids = [*_ids(by_bytes, b"a"), SPECIAL, *_ids(by_bytes, b"b")]
    stream = TextStream(by_bytes, [], stop=["ab"])
    assert stream.push(ids) == ""
    assert (stream.stopped, stream.tokens_used) == ("ab", 3)
    shown = TextStream(by_bytes, [], skip_special_tokens=False)
    assert shown.push(ids) == "a<|eos|>b"


@pytest.mark.parametrize("stop", [[""], ["a", ""], "a", [3], [None]])
def test_stop_strings_that_cannot_be(by_bytes: Tokenizer, stop: Any) -> None:
    with pytest.raises(InvalidParameter, match="non-empty strings"):
        TextStream(by_bytes, [], stop=stop)


@pytest.mark.parametrize(
    ("data", "stop"),
    [
        (b"\x80", ()),
        (b"\xff", ("\ufffd" * 50 + "x",)),
        (b"\xf0\x9f\x98", ()),
        (b"a", ("a" * 5000 + "b",)),
        (b"ab", ("ab" * 2000 + "c", "ba" * 2000 + "c")),
    ],
)
def test_pathological_streams_take_linear_time(by_bytes: Tokenizer, data: bytes, stop: tuple[str, ...]) -> None:
    ids = _ids(by_bytes, data) * (100_000 // len(data))
    stream = TextStream(by_bytes, ids, stop=stop)
    start = time.perf_counter()
    for id in ids:
        stream.push([id])
    stream.finish()
    assert time.perf_counter() - start < 5  # about 0.1 s; quadratic would be minutes
    assert len(stream.text) >= len(ids) // len(data)


def test_a_long_text_of_words(by_bytes: Tokenizer) -> None:
    ids = _ids(by_bytes, "Größe 😀 ".encode() * 5000)
    stream = TextStream(by_bytes, [], stop=["Große", "😀😀"])
    assert "".join(stream.push([id]) for id in ids) + stream.finish() == "Größe 😀 " * 5000
