"""Log-probabilities as OpenAI's clients expect them."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence

import msgspec

from treadle.outputs import Logprob
from treadle.tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity; this is OpenAI's stand-in for it


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    """bytes: of the token, which need not be whole characters; `token` shows them as well as text can."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """By token. text_offset: characters of the returned text before it. The first token of a model's context has none.

    A token that is not whole characters is written as `bytes:\\xe2\\x82`, so that each has a name of its own.
    """

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


def chat_logprobs(
    tokenizer: Tokenizer, ids: Sequence[int], tables: Sequence[Mapping[int, Logprob]], top: int
) -> ChatLogprobs:
    """tables: one for each of `ids`. top: how many alternatives to list."""
    return ChatLogprobs([_chat_entry(tokenizer, id, table, top) for id, table in zip(ids, tables, strict=True)])


class CompletionScores:
    """Makes the log-probabilities of one completion, whole or in pieces; keeps the offset in between.

    skip_special_tokens: whether they are left out of the text, and so take no room in it.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._skip = skip_special_tokens
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, ids: Sequence[int], tables: Sequence[Mapping[int, Logprob] | None]) -> CompletionLogprobs:
        """tables: one for each of `ids`; None where there is none, as for the first token of a prompt."""
        made = CompletionLogprobs()
        for id, table in zip(ids, tables, strict=True):
            piece = self._tokenizer.pieces.piece(id, False)
            made.tokens.append(_name(piece))
            made.token_logprobs.append(None if table is None else _finite(table[id].logprob))
            made.top_logprobs.append(None if table is None else self._alternatives(table))
            made.text_offset.append(self._offset)
            shown = self._tokenizer.pieces.piece(id, self._skip)
            self._offset += len(self._decoder.decode(shown))
        return made

    def _alternatives(self, table: Mapping[int, Logprob]) -> dict[str, float]:
        pieces = self._tokenizer.pieces
        # Highest first; of two tokens that look the same, the likelier keeps the name.
        named: dict[str, float] = {}
        for id, entry in best(table, self._top):
            named.setdefault(_name(pieces.piece(id, False)), _finite(entry.logprob))
        return named


def best(table: Mapping[int, Logprob], top: int) -> list[tuple[int, Logprob]]:
    """The `top` likeliest of a table, which also holds the chosen token, likely or not."""
    return sorted(table.items(), key=lambda item: -item[1].logprob)[:top]


def _chat_entry(tokenizer: Tokenizer, id: int, table: Mapping[int, Logprob], top: int) -> ChatLogprob:
    piece = tokenizer.pieces.piece(id, False)
    others = []
    for other, entry in best(table, top):
        data = tokenizer.pieces.piece(other, False)
        others.append(TopLogprob(_text(data), _finite(entry.logprob), list(data)))
    return ChatLogprob(_text(piece), _finite(table[id].logprob), list(piece), others)


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _name(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
