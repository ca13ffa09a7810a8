"""The grammar of a free choice: what it lets pass, and that every call in that is one that was promised."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from treadle.http.chat_bodies import FunctionTool
from treadle.http.tool_formats import HERMES, LLAMA, MISTRAL, Call, ToolFormat
from treadle.http.tool_grammars_auto import text_or_calls
from treadle.http.tool_stream import ToolStream
from treadle.scheduler.guidance.llg import LlgMatching
from treadle.scheduler.guidance.matching import Advance, Grammar
from treadle.scheduler.guidance.replicas import Row, spread
from treadle.tokenizer import Tokenizer

from .guidekit import unheard
from .toolkit import HOUR, TOWN, is_valid, with_marks
from .vocabulary import EOS, VOCAB_SIZE

FORMATS = (HERMES, MISTRAL, LLAMA)
REFERRED = {**TOWN, "properties": {"town": {"$ref": "#/$defs/T"}}, "$defs": {"T": TOWN["properties"]["town"]}}
FUNCTIONS = [
    FunctionTool("weather", None, REFERRED, True),
    FunctionTool("alarm", None, HOUR, True),
    FunctionTool("note", None, {"type": "object", "unheardOf": 1}),
]
ROME = '{"name": "weather", "arguments": {"town":"Rome"}}'
TEN = '{"name":"alarm" , "parameters":{"hour":10}}'
NOTE = '{"name": "note", "arguments": {"a": [1, {"b": "}"}]}}'
HERMES_ROME = f"<tool_call>\n{ROME}\n</tool_call>"
TEXTS = ["", " Rain. ", "1 < 2 <tool_ [TOOL_CALLS", 'So: {"name": "x"}', "ünï 🎉", "<|im_start|>a<|im_end|>\n"]
ALLOWED = {
    HERMES: [
        HERMES_ROME,
        f"I look. {HERMES_ROME}\n<tool_call>{TEN}</tool_call> Done.",
        f"<tool_call>{NOTE}</tool_call>",
    ],
    MISTRAL: [
        f"[TOOL_CALLS] [{ROME}, {TEN}]",
        f"I look.[TOOL_CALLS][{NOTE}]",
        '[TOOL_CALLS]weather[ARGS]{"town":"Rome"}[TOOL_CALLS]alarm[ARGS] {"hour":10}',
    ],
    LLAMA: [
        ROME,
        f"\n{TEN}; {ROME}",
        f"I look. <|python_tag|>{ROME}",
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"town":"Rome"}}',
        f"<|im_start|>a<|python_tag|>{NOTE}",
    ],
}
FORBIDDEN = {
    HERMES: ["<tool_call>x", f"<tool_call>{ROME}", "a <tool_call> b </tool_call>", f"<tool_call>[{ROME}]</tool_call>"],
    MISTRAL: [f"[TOOL_CALLS]{ROME}", f"[TOOL_CALLS][{ROME}] and more", "[TOOL_CALLS]weather", "[TOOL_CALLS][]"],
    LLAMA: ['{"x": 1}', " \x0b{ x", f"{ROME} and more", "<|python_tag|>print(1)"],
}
WRONG = [("Rome", "Paris"), ("10", "24"), ('"town"', '"city"'), ('{"town"', '{"a":1,"town"'), ("weather", "rain")]


@dataclass(frozen=True)
class Held:
    """A grammar, and a tokenizer that has its marks as tokens or writes them in letters."""

    tokenizer: Tokenizer
    matching: LlgMatching
    grammar: Grammar

    def allows(self, text: str) -> bool:
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), EOS]
        [matcher] = spread([cast(Row[LLMatcher], self.grammar.start())])
        return matcher.validate_tokens(tokens) == len(tokens)

    def drawn(self, seed: int, likes: list[int], most: int) -> str:
        """What a model without sense writes, that likes some tokens."""
        dice = random.Random(seed)
        matcher = self.grammar.start()
        written: list[int] = []
        words = np.zeros((1, -(-VOCAB_SIZE // 32)), np.uint32)
        while len(written) < most:
            assert self.matching.advance([Advance(matcher, written[-1:], 0)], words, unheard) == {}
            allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB_SIZE]).tolist()
            liked = [token for token in likes if token in allowed]
            token = dice.choice(liked if liked and dice.random() < 0.3 else allowed)
            if token == EOS:
                break
            written.append(token)
        return self.tokenizer.decode(written, skip_special_tokens=False)


@pytest.fixture(scope="module")
def held(tiny: Path) -> dict[tuple[ToolFormat, bool], Held]:
    plain = Tokenizer.load(tiny)
    made = {}
    for marks, tokenizer in ((False, plain), (True, with_marks(plain))):
        matching = LlgMatching(tokenizer.to_info().tokenizer_json.decode(), VOCAB_SIZE, (EOS,))
        for format in FORMATS:
            grammar = matching.compile(text_or_calls(format, FUNCTIONS, tokenizer.added_tokens))
            made[format, marks] = Held(tokenizer, matching, grammar)
    return made


def calls_in(format: ToolFormat, text: str) -> tuple[str, list[Call]]:
    stream = ToolStream(format)
    found = [stream.push(text), stream.finish()]
    return "".join(one.text for one in found), [call for one in found for call in one.calls]


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_text_is_free_and_calls_are_what_was_promised(
    held: dict[tuple[ToolFormat, bool], Held], format: ToolFormat, marks: bool
) -> None:
    one = held[format, marks]
    for text in TEXTS:
        assert one.allows(text), text
    for text in ALLOWED[format]:
        assert one.allows(text) and calls_in(format, text)[1], text
        for right, wrong in WRONG:
            assert right not in text or not one.allows(text.replace(right, wrong)), text.replace(right, wrong)
    for text in FORBIDDEN[format]:
        assert not one.allows(text), text


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(FORMATS), st.booleans())
def test_whatever_is_drawn_its_calls_are_valid(
    held: dict[tuple[ToolFormat, bool], Held], seed: int, format: ToolFormat, marks: bool
) -> None:
    one = held[format, marks]
    mark = one.tokenizer.encode(format.opens, add_special_tokens=False) if marks else [ord("{")]
    text = one.drawn(seed, mark, 200)
    _, calls = calls_in(format, text)
    for call in calls:
        arguments: Any = json.loads(call.arguments)
        assert isinstance(arguments, dict)
        assert call.name == "note" or is_valid(call.name, call.arguments), text


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=40), st.sampled_from(FORMATS), st.booleans())
def test_any_text_without_a_call_is_let_through(
    held: dict[tuple[ToolFormat, bool], Held], text: str, format: ToolFormat, marks: bool
) -> None:
    assert held[format, marks].allows(text) == (format is not LLAMA or not text.lstrip().startswith("{"))
