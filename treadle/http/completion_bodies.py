"""`/v1/completions`: what comes in and goes out."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .bodies import MAX_PROMPTS, StreamOptions, Usage
from .sampling import SamplingFields, TokenId, Top
from .token_texts import CompletionLogprobs

_MAX_TOKENS = (1 << 31) - 1
Text = Annotated[str, Meta(min_length=1)]
Tokens = Annotated[list[TokenId], Meta(min_length=1)]
Several = Annotated[list[str | TokenId | Tokens], Meta(min_length=1)]


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """prompt: a text, a list of texts, token ids, or a list of lists of them.

    max_tokens: 16 when not given; 0 is allowed with `echo`, to score a text. echo: the prompt comes back before the
    completion, with `logprobs` scored too. best_of: `n`, since nothing is ranked here. suffix: none.
    """

    prompt: Text | Several
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=_MAX_TOKENS)] | None = None
    logprobs: Top | None = None
    prompt_logprobs: Top | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    suffix: Literal[""] | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One or several, of one kind. Raises ValueError when kinds are mixed or there are too many."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0]
        if not all(isinstance(one, type(first)) for one in self.prompt):
            raise ValueError("a list of texts, of token ids, or of lists of token ids is allowed, not a mixture")
        if isinstance(first, int):
            return [self.prompt]  # type: ignore[list-item]
        if len(self.prompt) > MAX_PROMPTS:
            raise ValueError(f"{len(self.prompt)} prompts: at most {MAX_PROMPTS} are allowed in one request")
        return self.prompt  # type: ignore[return-value]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """stop_reason: the stop text or token id that matched. prompt_logprobs: by position of the prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: CompletionLogprobs | None = None


class Completion(msgspec.Struct, kw_only=True):
    """Whole, or a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    object: Literal["text_completion"] = "text_completion"
    system_fingerprint: str | None = None
