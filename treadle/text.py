"""Text from tokens as they come, and where it stops."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from treadle.errors import InvalidParameter

from .tokenizer import Tokenizer

# An unfinished UTF-8 character is at most three bytes, so this much of a prompt decides how its end continues.
_UTF8_TAIL = 4


class TextStream:
    """The text of one continuation, token by token.

    prompt: the ids before it; they are not part of the text, but a character may begin in them. stop: strings that end
    the text, before them or, with `include_stop`, after; the one that is complete first wins, of several the longest.
    Characters and possible beginnings of stop strings are held back until they are certain, so what `push` and `finish`
    return adds up to the text, however the tokens were grouped. Work is linear in the text.

    min_tokens: stop strings are looked for in the text from this token on (counted from 1).
    Raises InvalidParameter when a stop string is empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidParameter(f"stop must be non-empty strings, not {stop!r:.80}")
        self.stopped: str | None = None
        self.tokens_used = 0
        self._pieces = tokenizer.pieces
        self._skip = skip_special_tokens
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._matchers = [_Matcher(text) for text in stop]
        self._emitted: list[str] = []
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        before = self._pieces.tail(prompt, skip_special_tokens, _UTF8_TAIL)
        self._at_start = self._pieces.strips_first_space and not before
        self._decoder.decode(before)

    @property
    def text(self) -> str:
        """All that `push` and `finish` have returned."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens, returns the text that has become certain. After a stop string, tokens change nothing."""
        fresh: list[str] = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.tokens_used += 1
            data = self._pieces.piece(token_id, self._skip)
            if data and self._at_start:
                self._at_start = False
                data = data.removeprefix(b" ")
            if data:
                fresh.append(self._advance(self._decoder.decode(data)))
        return self._emit("".join(fresh))

    def finish(self) -> str:
        """No more tokens will come: returns what was held back; an unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        last = self._advance(self._decoder.decode(b"", final=True)) + self._held
        if self.stopped is None:
            self._held = ""
        return self._emit(last)

    def _emit(self, text: str) -> str:
        if text:
            self._emitted.append(text)
        return text

    def _advance(self, text: str) -> str:
        """Runs the stop strings over new characters; returns what of `_held + text` is certain, keeps the rest held."""
        if not self._matchers or not text:
            return text
        end, winner = len(text) + 1, ""
        for matcher in self._matchers:
            found = matcher.feed(text)
            if 0 < found < end or (found == end and len(matcher.stop) > len(winner)):
                end, winner = found, matcher.stop
        whole = self._held + text
        if winner and self.tokens_used >= self._min_tokens:
            self.stopped = winner
            cut = len(self._held) + end
            self._held = ""
            return whole[: cut if self._include_stop else cut - len(winner)]
        if self.tokens_used < self._min_tokens:
            for matcher in self._matchers:
                matcher.matched = 0
        keep = len(whole) - max(matcher.matched for matcher in self._matchers)
        self._held = whole[keep:]
        return whole[:keep]


class _Matcher:
    """Looks for one string in a text that comes in pieces (Knuth, Morris and Pratt 1977).

    matched: how many characters at the end of the text so far are the beginning of `stop`.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # At i: the longest beginning of `stop` that is also a proper end of its first i + 1 characters.
        self._borders = [0] * len(stop)
        length = 0
        for index in range(1, len(stop)):
            length = self._extend(length, stop[index])
            self._borders[index] = length

    def feed(self, text: str) -> int:
        """Returns how many characters of `text` complete the string for the first time, or 0."""
        if self.matched == 0 and self.stop[0] not in text:
            return 0
        matched = self.matched
        for index, char in enumerate(text):
            matched = self._extend(matched, char)
            if matched == len(self.stop):
                self.matched = self._borders[-1]
                return index + 1
        self.matched = matched
        return 0

    def _extend(self, length: int, char: str) -> int:
        while length and self.stop[length] != char:
            length = self._borders[length - 1]
        return length + 1 if self.stop[length] == char else 0
