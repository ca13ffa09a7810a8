"""Compiled grammars, kept: programs mostly ask for the same few schemas again and again."""

from __future__ import annotations

from .matching import Grammar

_MAX_GRAMMARS = 256
_MAX_CHARACTERS = 4 << 20

Key = tuple[str, str]
"""`Guided.source`."""


class GrammarCache:
    """The least recently used goes first, when there are too many or their texts are too long together."""

    def __init__(self, max_grammars: int = _MAX_GRAMMARS, max_characters: int = _MAX_CHARACTERS) -> None:
        self._max_grammars = max_grammars
        self._max_characters = max_characters
        self._grammars: dict[Key, Grammar] = {}
        self._characters = 0

    def __len__(self) -> int:
        return len(self._grammars)

    def get(self, key: Key) -> Grammar | None:
        """None too for one that is spent: then it is compiled again."""
        grammar = self._grammars.pop(key, None)
        if grammar is None:
            return None
        if grammar.spent:
            self._characters -= len(key[1])
            return None
        self._grammars[key] = grammar  # at the end again: the last one used
        return grammar

    def drop_spent(self) -> None:
        """Lets go of what nobody can use again: such a grammar has grown to its library's limits, 160 MB or more."""
        for key in [key for key, grammar in self._grammars.items() if grammar.spent]:
            del self._grammars[key]
            self._characters -= len(key[1])

    def put(self, key: Key, grammar: Grammar) -> None:
        if self._grammars.pop(key, None) is None:
            self._characters += len(key[1])
        self._grammars[key] = grammar
        while len(self._grammars) > self._max_grammars or self._characters > self._max_characters:
            oldest = next(iter(self._grammars))
            del self._grammars[oldest]
            self._characters -= len(oldest[1])
