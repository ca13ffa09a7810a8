"""Grammars by llguidance, which walks a trie of the vocabulary with an Earley parser over lazy automata.

Python gives its lock up while llguidance works, and one call serves many rows on threads of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from treadle.errors import InvalidParameter, InvalidRequest
from treadle.transport.masks import Words
from treadle.transport.messages import Guided

from .matching import Advance
from .multiples import check_grammar_multiples, check_multiples
from .spelling import plain_decoder

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of a JSON text. Bounded, or a small model may go on with it for ever."""
_MAX_LEXER_STATES = 50_000
_MAX_SAID = 600


@dataclass(frozen=True, slots=True)
class LlgGrammar:
    """`Grammar` of llguidance: a matcher that nobody moves, to be copied."""

    prototype: LLMatcher

    def start(self) -> LLMatcher:
        return self.prototype.deep_copy()


class LlgMatching:
    """`Matching` by llguidance.

    tokenizer_json: of the `tokenizers` library. vocab_size: of the model, which may pad it. eos_token_ids: allowed when
    a grammar is complete. Raises InvalidRequest where it cannot serve this tokenizer.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        ends = [token for token in eos_token_ids if 0 <= token < vocab_size]
        if not ends:
            raise InvalidRequest("guided: this model names no end-of-sequence token, so no output could ever end")
        try:
            self._tokenizer = LLTokenizer(plain_decoder(tokenizer_json), n_vocab=vocab_size, eos_token=ends)
        except Exception as error:  # the library raises what it likes
            raise InvalidRequest(f"guided: llguidance does not serve this model's tokenizer: {error}") from error
        if self._tokenizer.vocab_size != vocab_size:
            raise InvalidRequest(
                f"guided: the tokenizer has {self._tokenizer.vocab_size} tokens and the model {vocab_size}"
            )
        self.vocab_size = vocab_size
        self._executor = LLExecutor()

    def compile(self, guided: Guided) -> LlgGrammar:
        kind, text = guided.source
        try:
            matcher = LLMatcher(self._tokenizer, _grammar(kind, text), log_level=0, limits=_limits())
            if not matcher.is_error():
                matcher.compute_bitmask()  # finds what allows nothing, and fills the tables that copies share
        except InvalidParameter:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            raise InvalidParameter(f"guided.{kind}: it cannot be compiled: {error}") from error
        if matcher.is_error():
            raise InvalidParameter(f"guided.{kind}: {matcher.get_error()[:_MAX_SAID].strip()}")
        return LlgGrammar(matcher)

    def advance(self, work: Sequence[Advance], words: Words) -> dict[int, str]:
        matchers = [cast(LLMatcher, item.matcher) for item in work]  # our grammars started them
        single: list[tuple[LLMatcher, int]] = []
        for matcher, item in zip(matchers, work, strict=True):
            if len(item.tokens) == 1:
                single.append((matcher, item.tokens[0]))
            elif item.tokens:
                matcher.consume_tokens(list(item.tokens))
        if single:  # it refuses an empty list, and so does the other
            self._executor.consume_token_par(single)
        failed = [matcher.is_error() for matcher in matchers]
        good = [(m, item.row) for m, item, bad in zip(matchers, work, failed, strict=True) if not bad]
        if good:
            self._executor.unsafe_compute_mask_ptr(good, words.ctypes.data, words.strides[0], len(words))
        pairs = zip(matchers, work, strict=True)
        return {item.row: matcher.get_error()[:_MAX_SAID] for matcher, item in pairs if matcher.is_error()}


def _limits() -> LLParserLimits:
    return LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)


def _grammar(kind: str, text: str) -> str:
    if kind == "json":
        check_multiples(text)
        return LLMatcher.grammar_from_json_schema(text, defaults=_json_options(text))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(text)
    if kind == "choice":
        choices: list[str] = json.loads(text)
        # Lark writes text as JSON does.
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(item) for item in choices))
    check_grammar_multiples(text)
    return LLMatcher.grammar_from_lark(text)


def _json_options(text: str) -> JsonCompileOptions | None:
    """Ours, unless the schema has its own ("x-guidance") or is true or false, which can have none.

    Raises InvalidParameter for what is no schema.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(f"guided.json: not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise InvalidParameter(f"guided.json: a schema is an object, true or false, not {type(schema).__name__}")
    if isinstance(schema, bool) or "x-guidance" in schema:
        return None
    return {"whitespace_pattern": _WHITESPACE}
