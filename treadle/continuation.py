"""One continuation as its reader builds it: tokens to text, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from treadle.text import TextStream
from treadle.tokenizer import Tokenizer
from treadle.transport.codec import unpack
from treadle.transport.messages import Delta, SamplingParams, TokenLogprobs

from .outputs import CompletionOutput, Logprob


class Continuation:
    """Takes `Delta`s in, gives `CompletionOutput`s out. Without a tokenizer the text stays empty."""

    def __init__(self, index: int, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self._index = index
        self._include_stop = params.include_stop_str_in_output
        self._token_ids: list[int] = []
        self._logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._cumulative = 0.0
        self._read_tokens = 0
        self._read_text = 0
        self._text: TextStream | None = None
        if tokenizer is not None:
            self._text = TextStream(
                tokenizer,
                prompt,
                stop=params.stop_strings,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            )
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None

    @property
    def tokens(self) -> list[int]:
        """What came so far."""
        return self._token_ids

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def feed(self, delta: Delta, eos_token_ids: Sequence[int]) -> bool:
        """Takes new tokens in. True when a stop string ended the text here, so that the service need not go on."""
        if self.finished:
            return False
        self._token_ids += delta.tokens
        self._score(delta.logprobs)
        if self._text is not None and delta.tokens:
            ends_on_token = delta.stop_token >= 0 and not self._include_stop
            self._text.push(delta.tokens[:-1] if ends_on_token else delta.tokens)
            if self._text.stopped is not None:
                self._cut()
                return not delta.finish
        if delta.finish:
            self.finish_reason = delta.finish
            if delta.stop_token >= 0 and delta.stop_token not in eos_token_ids:
                self.stop_reason = delta.stop_token
            if self._text is not None:
                self._text.finish()
        return False

    def read(self) -> CompletionOutput:
        """The whole so far, with what is new since the last read."""
        text = self._text.text if self._text is not None else ""
        output = CompletionOutput(
            index=self._index,
            text=text,
            token_ids=self._token_ids.copy(),
            delta=text[self._read_text :],
            delta_token_ids=self._token_ids[self._read_tokens :],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
        )
        self._read_text, self._read_tokens = len(text), len(self._token_ids)
        return output

    def _cut(self) -> None:
        """The stop string ended the text in the middle of what came: tokens after it were never the reader's."""
        if self._text is None:
            return
        used = self._text.tokens_used
        del self._token_ids[used:]
        if self._logprobs is not None:
            del self._logprobs[used:]
        self.finish_reason = "stop"
        self.stop_reason = self._text.stopped

    def _score(self, entries: Sequence[TokenLogprobs]) -> None:
        if self._logprobs is None:
            return
        for entry in entries:
            self._logprobs.append(logprob_table(entry))
            self._cumulative += entry.logprob


def logprob_table(entry: TokenLogprobs) -> dict[int, Logprob]:
    """Token id to Logprob, the chosen token first."""
    table = {entry.token_id: Logprob(entry.logprob, entry.rank)}
    values = np.frombuffer(entry.top_logprobs, np.dtype("<f4")).tolist()
    for place, (token, value) in enumerate(zip(unpack(entry.top_ids).tolist(), values, strict=True), start=1):
        table.setdefault(token, Logprob(value, place))
    return table
