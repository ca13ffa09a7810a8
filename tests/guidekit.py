"""Guided requests in tests: a grammar library that fits on a screen, and masks made in step with a core."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from treadle.scheduler.core import Core
from treadle.scheduler.guidance.llg import LlgMatching
from treadle.scheduler.guidance.matching import Advance, Grammar, Matching
from treadle.scheduler.guidance.rows import GuidedRows, MadeMasks, MaskMemory
from treadle.scheduler.request import Output, Request
from treadle.tokenizer import Tokenizer
from treadle.transport.masks import Words
from treadle.transport.messages import Guided

from .vocabulary import EOS, VOCAB_SIZE


@dataclass
class TrieMatcher:
    allows: Callable[[list[int]], frozenset[int]]
    seen: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class TrieGrammar:
    """Some sequences of token ids, then EOS; where that is not what came, or there is no EOS, everything."""

    choices: list[list[int]]
    vocab_size: int
    eos: tuple[int, ...]
    spent: bool = False

    def allows(self, output: list[int]) -> frozenset[int]:
        n = len(output)
        going_on = {choice[n] for choice in self.choices if choice[:n] == output and len(choice) > n}
        ending = self.eos if output in self.choices else ()
        return frozenset(going_on.union(ending)) or frozenset(range(self.vocab_size))

    def start(self) -> TrieMatcher:
        return TrieMatcher(self.allows)


@dataclass(frozen=True)
class TrieMatching:
    """`Matching` for `Guided(choice=["3 1 4", …])`: token ids in writing."""

    vocab_size: int
    eos: tuple[int, ...] = ()

    def compile(self, guided: Guided) -> TrieGrammar:
        choices = [[int(token) for token in text.split()] for text in json.loads(guided.source[1])]
        return TrieGrammar(choices, self.vocab_size, self.eos)

    def advance(self, work: Sequence[Advance], words: Words, begun: Callable[[], None]) -> dict[int, str]:
        begun()
        for item in work:
            assert isinstance(item.matcher, TrieMatcher)
            item.matcher.seen += item.tokens
            words[item.row] = words_of(item.matcher.allows(item.matcher.seen), self.vocab_size)
        return {}


def unheard() -> None:
    """Nobody wants to know when a library has begun."""


def words_of(allowed: frozenset[int], vocab_size: int) -> Words:
    """One mask, uint32 [words]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    bits[list(allowed)] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)


class Guiding:
    """What a service does for guided requests, at once and on this thread."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self.rows = GuidedRows()
        self.memory = MaskMemory()
        self.failed: list[str] = []

    def begin(self, request: Request) -> Grammar | None:
        """The request's grammar, if it is guided."""
        if request.params.guided is None:
            return None
        grammar = self.matching.compile(request.params.guided)
        self.rows.begin(request, grammar)
        return grammar

    def made(self, core: Core) -> list[MadeMasks]:
        """All that can be made now; nothing of it may fail."""
        made = [self.rows.job(due).run(self.matching, self.memory, unheard) for due in core.masks_due()]
        assert not [item.failed for item in made if item.failed]
        return made

    def end(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.finish:
                self.rows.forget(output.sequence)


def llg(model: Path) -> LlgMatching:
    """llguidance for a checkpoint of `modelkit`."""
    return LlgMatching(Tokenizer.load(model).to_info().tokenizer_json.decode(), VOCAB_SIZE, (EOS,))
