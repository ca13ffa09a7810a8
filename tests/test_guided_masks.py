"""Masks of llguidance: what we do for speed changes none of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from treadle import Guided
from treadle.models import resolve_model
from treadle.scheduler.guidance import llg
from treadle.scheduler.guidance.cache import GrammarCache
from treadle.scheduler.guidance.llg import LlgGrammar, LlgMatching
from treadle.scheduler.guidance.matching import Advance
from treadle.scheduler.guidance.replicas import ROWS_EACH, Row
from treadle.tokenizer import Tokenizer
from treadle.transport.masks import Words, words_for

from .guidekit import unheard
from .replicakit import AtOnce
from .vocabulary import EOS, VOCAB_SIZE

STEPS = 24
TEXT = {"type": "string"}


def listed(item: dict[str, Any]) -> Guided:
    """An array that no walk of STEPS tokens finishes."""
    return Guided(
        json={"type": "array", "items": item, "minItems": 1_000, "x-guidance": {"whitespace_flexible": False}}
    )


BOUNDED = listed({**TEXT, "maxLength": 40})
GRAMMARS = [
    *(listed({**TEXT, "maxLength": length}) for length in (1, 2, 5, 8, 9, 12, 31, 40, 200)),
    listed({**TEXT, "minLength": 4, "maxLength": 21}),
    listed(TEXT),
    listed({**TEXT, "pattern": "^[A-Z][a-z]{1,7}( [a-zé]{2,13})*$"}),
    listed({**TEXT, "format": "date"}),
    listed({}),
    Guided(regex=r'([^"\\]{0,9};){90}'),
    Guided(json_object=True),
]


@pytest.fixture(scope="module")
def matching() -> LlgMatching:
    tokenizer = Tokenizer.load(resolve_model("smollm2-135m"))
    text = tokenizer.to_info().tokenizer_json.decode()
    made = LlgMatching(text, tokenizer.vocab_size, tokenizer.eos_token_ids, replicas=5)
    made._builder = AtOnce()
    return made


def chosen(random: np.random.Generator, mask: Words) -> int:
    """One of the tokens that a mask allows."""
    return int(random.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))))


def matcher(tokenizer: LLTokenizer, guided: Guided) -> LLMatcher:
    """Of llguidance alone."""
    return LLMatcher(tokenizer, llg._grammar(*guided.source), log_level=0, limits=llg._limits())


def mask_of(plain: LLMatcher, size: int) -> Words:
    """Without the word that llguidance may have one more."""
    return np.frombuffer(plain.compute_bitmask(), np.uint32)[: words_for(size)]


@pytest.mark.parametrize("number", range(len(GRAMMARS)))
def test_slices_change_no_mask(matching: LlgMatching, standard: LLTokenizer, number: int) -> None:
    """Beside llguidance's own, and on a walk that the masks allow."""
    random = np.random.default_rng(number)
    ours, theirs = matcher(matching._tokenizer, GRAMMARS[number]), matcher(standard, GRAMMARS[number])
    for _ in range(STEPS):
        mask = mask_of(ours, matching.vocab_size)
        assert (mask == mask_of(theirs, matching.vocab_size)).all()
        if ours.is_stopped():
            break
        token = chosen(random, mask)
        assert ours.consume_token(token) and theirs.consume_token(token)


@pytest.fixture(scope="module")
def standard(matching: LlgMatching) -> LLTokenizer:
    return matching._tokenizer.with_slices(LLTokenizer.general_slices())


def walk(
    matching: LlgMatching, random: np.random.Generator, rows: list[Row[LLMatcher]], last: dict[int, list[int]]
) -> Words:
    """A step of all rows. last: by row, what it gets; what it samples is put there for the next."""
    words = np.zeros((len(rows), words_for(matching.vocab_size)), np.uint32)
    work = [Advance(row, last[id(row)], place) for place, row in enumerate(rows)]
    assert not matching.advance(work, words, unheard)
    for row, mask in zip(rows, words, strict=True):
        last[id(row)] = [chosen(random, mask)]
    return words


def test_rows_that_are_spread_over_replicas_have_the_masks_of_one(matching: LlgMatching) -> None:
    """Whether they begin, end, come again with all their tokens, or change to another prototype on the way."""
    random = np.random.default_rng(0)
    grammar = matching.compile(BOUNDED)
    rows: list[Row[LLMatcher]] = []
    last: dict[int, list[int]] = {}
    changed = 0
    for step in range(STEPS):
        new = [grammar.start() for _ in range(3 if step < 8 else 0)]
        rows += new
        last |= {id(row): [] for row in new}
        if step % 5 == 4:
            rows.pop(int(random.integers(len(rows))))
        if step == 12:  # a new scheduler has no matchers, but the tokens
            again = grammar.start()
            last[id(again)] = [*rows[0].tokens, *last[id(rows[0])]]
            rows[0] = again
        before = [row.replica for row in rows]
        words = walk(matching, random, rows, last)
        now = [row.replica for row in rows]
        changed += sum(old is not None and old is not new for old, new in zip(before, now, strict=True))
        for row in (rows[0], rows[step % len(rows)]):
            plain = matcher(matching._tokenizer, BOUNDED)
            plain.consume_tokens(row.tokens.tolist())
            assert (words[rows.index(row)] == mask_of(plain, matching.vocab_size)).all()
    loads = np.unique([id(row.replica) for row in rows], return_counts=True)[1]
    assert len(loads) == min(5, -(-len(rows) // ROWS_EACH)) and loads.max() - loads.min() < 2
    assert changed


def test_a_row_that_fails_fails_alone(matching: LlgMatching) -> None:
    """Those that come later have the grammar compiled again."""
    grammar, cache = matching.compile(BOUNDED), GrammarCache()
    cache.put(BOUNDED.source, grammar)
    rows = [grammar.start() for _ in range(3)]
    words = np.zeros((3, words_for(matching.vocab_size)), np.uint32)
    assert not matching.advance([Advance(row, [], place) for place, row in enumerate(rows)], words, unheard)
    allowed = [chosen(np.random.default_rng(0), mask) for mask in words]
    allowed[1] = int(np.flatnonzero(np.unpackbits(words[1].view(np.uint8), bitorder="little") == 0)[0])
    assert cache.get(BOUNDED.source) is grammar
    failed = matching.advance([Advance(row, [allowed[place]], place) for place, row in enumerate(rows)], words, unheard)
    assert list(failed) == [1] and failed[1]
    assert grammar.spent and cache.get(BOUNDED.source) is None
    cache.put(BOUNDED.source, matching.compile(BOUNDED))
    assert isinstance(found := cache.get(BOUNDED.source), LlgGrammar) and not found.spent
    random, others = np.random.default_rng(1), [rows[0], rows[2]]
    last: dict[int, list[int]] = {id(row): [] for row in others}
    for _ in range(3):
        walk(matching, random, others, last)


def test_a_lexer_that_is_used_up_is_made_anew(matching: LlgMatching, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies share it: without that, one output could spoil a schema for all that come later."""
    monkeypatch.setattr(llg, "_MAX_LEXER_STATES", 150)
    words = np.zeros((1, words_for(matching.vocab_size)), np.uint32)
    random, grammar = np.random.default_rng(2), matching.compile(BOUNDED)
    row, token, failed = grammar.start(), list[int](), dict[int, str]()
    for _ in range(200):
        if failed := matching.advance([Advance(row, token, 0)], words, unheard):
            break
        token = [chosen(random, words[0])]
    assert "too many states" in failed[0] and grammar.spent
    again = matching.compile(BOUNDED).start()
    assert not matching.advance([Advance(again, row.tokens[:2].tolist(), 0)], words, unheard)


BUILDING = """
import sys
from treadle import Guided
from treadle.scheduler.guidance.llg import LlgMatching
from treadle.scheduler.guidance.replicas import spread

matching = LlgMatching(sys.stdin.read(), int(sys.argv[1]), [int(sys.argv[2])], replicas=10_000)
grammar = matching.compile(Guided(json={"type": "array", "items": {"type": "string", "maxLength": 40}}))
rows = [grammar.start() for _ in range(4_000)]
spread(rows)
print("building")
"""


COMPILING = """
import asyncio, sys
from treadle import Guided
from treadle.scheduler.guidance.guide import Guide
from treadle.scheduler.guidance.llg import LlgMatching

async def main():
    guide = Guide(lambda: LlgMatching(sys.stdin.read(), int(sys.argv[1]), [int(sys.argv[2])]), 10.0)
    await guide.compile(Guided(regex="a"))
    properties = {f"p{i}": {"type": "string", "pattern": "^[a-z]{1,30}(x|y){2,9}$", "maxLength": i} for i in range(99)}
    asyncio.create_task(guide.compile(Guided(json={"type": "object", "properties": properties})))
    while not guide._compiling:
        await asyncio.sleep(0)
    guide.close()

asyncio.run(main())
print("building")
"""


@pytest.mark.parametrize("program", [BUILDING, COMPILING])
def test_a_program_may_end_while_a_grammar_is_compiled(tiny: Path, program: str) -> None:
    """It waits for that one, but not for the thousand that are to be compiled again."""
    text = Tokenizer.load(tiny).to_info().tokenizer_json.decode()
    command = [sys.executable, "-c", program, str(VOCAB_SIZE), str(EOS)]
    ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "building\n"), ended.stderr
