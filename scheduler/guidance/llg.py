"""Grammars by llguidance, which walks a trie of the vocabulary with an Earley parser over lazy automata.

Python gives its lock up while llguidance works, and one call serves many rows on threads of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from treadle.errors import InvalidParameter, InvalidRequest
from treadle.transport.masks import Words
from treadle.transport.messages import Guided

from .matching import Advance
from .multiples import check_grammar_multiples, check_multiples
from .replicas import Builder, Replicas, Row, spread
from .slices import string_slices
from .spelling import plain_decoder

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of a JSON text. Bounded, or a small model may go on with it for ever."""
_MAX_LEXER_STATES = 50_000
_MAX_SAID = 600
_MANY = 8
_NOTHING, _NOT_VERBOSE = "NoExtensionBias", "<non-verbose/>"


@dataclass(frozen=True, slots=True)
class LlgGrammar:
    """`Grammar` of llguidance: matchers that nobody moves, to be copied."""

    replicas: Replicas[LLMatcher]

    @property
    def spent(self) -> bool:
        return self.replicas.failed

    def start(self) -> Row[LLMatcher]:
        return self.replicas.start()


class LlgMatching:
    """`Matching` by llguidance.

    tokenizer_json: of the `tokenizers` library. vocab_size: of the model, which may pad it. eos_token_ids: allowed when
    a grammar is complete. replicas: of one grammar's prototypes at most. Raises InvalidRequest where it cannot serve
    this tokenizer.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int], replicas: int | None = None
    ) -> None:
        ends = [token for token in eos_token_ids if 0 <= token < vocab_size]
        if not ends:
            raise InvalidRequest("guided: this model names no end-of-sequence token, so no output could ever end")
        try:
            self._tokenizer = LLTokenizer(
                plain_decoder(tokenizer_json), n_vocab=vocab_size, eos_token=ends, slices=string_slices()
            )
        except Exception as error:  # the library raises what it likes
            raise InvalidRequest(f"guided: llguidance does not serve this model's tokenizer: {error}") from error
        if self._tokenizer.vocab_size != vocab_size:
            raise InvalidRequest(
                f"guided: the tokenizer has {self._tokenizer.vocab_size} tokens and the model {vocab_size}"
            )
        self.vocab_size = vocab_size
        self._executor = LLExecutor(mask_threads())
        self._builder = Builder()
        self._most_replicas = most_replicas() if replicas is None else replicas

    def compile(self, guided: Guided) -> LlgGrammar:
        kind, text = guided.source
        began = time.monotonic()
        try:
            grammar = _grammar(kind, text)
            matcher = self._prototype(grammar)
        except InvalidParameter:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            raise InvalidParameter(f"guided.{kind}: it cannot be compiled: {error}") from error
        if matcher.is_error():
            raise InvalidParameter(f"guided.{kind}: {_said(matcher.get_error())}")
        seconds = time.monotonic() - began
        again = partial(self._prototype, grammar)
        return LlgGrammar(Replicas(matcher, again, seconds, self._most_replicas, self._builder))

    def _prototype(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds what allows nothing, and fills the tables that copies share
        return matcher

    def advance(self, work: Sequence[Advance], words: Words, begun: Callable[[], None]) -> dict[int, str]:
        rows = [cast(Row[LLMatcher], item.matcher) for item in work]  # our grammars started them
        matchers = spread(rows)
        # Neighbours are worked on at about the same time, and those of one prototype wait for each other.
        prototypes = [id(row.replica) for row in rows]
        side_by_side = sorted(range(len(work)), key=prototypes.__getitem__)
        fed: list[tuple[LLMatcher, int]] = []
        masks: list[tuple[LLMatcher, int]] = []
        for place in side_by_side:
            item, matcher = work[place], matchers[place]
            if len(item.tokens) == 1:
                fed.append((matcher, item.tokens[0]))
            elif item.tokens:
                matcher.consume_tokens(list(item.tokens))
            masks.append((matcher, item.row))
        if fed:  # it refuses an empty list, and so does the other
            self._executor.consume_token_par(fed)
        begun()
        if masks:  # one that cannot go on allows the end
            self._executor.unsafe_compute_mask_ptr(masks, words.ctypes.data, words.strides[0], len(words))
        failed: dict[int, str] = {}
        for item, row, matcher in zip(work, rows, matchers, strict=True):
            for token in item.tokens:  # nearly always one, and to append is a third of the time of to extend
                row.tokens.append(token)
            if matcher.is_error():
                failed[item.row] = _said(matcher.get_error())
                row.replicas.failed = True
        return failed


def mask_threads() -> int:
    """Of an executor. All processors where there are many: while masks are made, the ranks mostly wait for them. Of
    few, one is left to the loop and the ranks, as the library does everywhere."""
    processors = os.cpu_count() or 1
    return min(32, processors if processors >= _MANY else max(1, processors * 4 // 5))


def most_replicas() -> int:
    """Prototypes of one grammar at most: some for each thread of an executor, and one where there is one thread."""
    threads = mask_threads()
    return 1 if threads == 1 else 3 * threads


def _said(error: str) -> str:
    """An error of the library's, in words that its users know."""
    if _NOTHING in error:
        return "nothing satisfies it"
    return error.replace(_NOT_VERBOSE, "")[:_MAX_SAID].strip()


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
