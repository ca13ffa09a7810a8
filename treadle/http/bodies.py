"""What several endpoints share: usage, options of a stream, the models, tokens and health."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from treadle.outputs import RequestOutput

from .sampling import TokenId

MAX_PROMPTS = 1024


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """include_usage: a last chunk with the token counts. include_obfuscation: accepted; we send no padding."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class PromptDetails(msgspec.Struct):
    """cached_tokens: prompt tokens that the prefix cache served."""

    cached_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage_of(outputs: list[RequestOutput]) -> Usage:
    """Counts of all prompts and continuations of one HTTP request; a prompt counts once, whatever `n` is."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    written = sum(len(part.token_ids) for output in outputs for part in output.outputs)
    cached = sum(output.cached_tokens for output in outputs)
    return Usage(prompt, written, prompt + written, PromptDetails(cached))


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    root: str
    object: Literal["model"] = "model"
    owned_by: str = "treadle"


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Of a text (`prompt`) or of a conversation (`messages`, put through the chat template): one of the two."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=1 << 20)]


class DetokenizeAnswer(msgspec.Struct):
    prompt: str


class HealthAnswer(msgspec.Struct):
    """status: "ready" with 200; "starting", "degraded", "stuck", "draining", "failed", "closed", "lost" with 503.

    step_age: seconds.
    """

    status: str
    detail: str = ""
    step: int = 0
    step_age: float = 0.0
