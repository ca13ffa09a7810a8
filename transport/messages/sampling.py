"""How the next tokens are to be chosen, and what is told of a choice."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from treadle.errors import InvalidParameter


class Guided(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the output must be; exactly one field is given. Field names are those of vLLM's `StructuredOutputsParams`.

    json: a JSON schema, as a dict or as text; kept and sent as text. json_object: any JSON object. regex: the whole
    output matches it (Rust's syntax, no look-around or back-references). choice: the output is one of these texts.
    grammar: in the Lark dialect of llguidance, with a rule `start`.

    Raises InvalidParameter for a dict that JSON cannot say; the rest is checked by `transport.params`.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, dict):
            msgspec.structs.force_setattr(self, "json", _json_text(self.json))

    @property
    def source(self) -> tuple[str, str]:
        """(kind, text): which field was given, and its value as text."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.choice is not None:
            return "choice", _json_text(self.choice)
        for kind, text in (("json", self.json), ("regex", self.regex), ("grammar", self.grammar)):
            if text is not None:
                return kind, str(text)
        return "", ""


def _json_text(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"guided: {type(value).__name__} cannot be written as JSON: {error}") from error


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose the next tokens. Field names and meanings are those of vLLM's `SamplingParams`.

    Values are checked by `treadle.transport.params.check_params`, which says what is allowed.

    n: continuations of the same prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p, min_p: in [0, 1].
    repetition_penalty: over prompt and output, 1 is none. presence_penalty, frequency_penalty: over the output, 0 none.
    seed: None draws one; the same seed gives the same tokens whatever else runs. max_tokens: None is up to the context
    limit. stop: strings that end the text. logprobs, prompt_logprobs: how many of the top log-probabilities to return
    beside the chosen token's; None is none. logit_bias: token id to an addend. allowed_token_ids, banned_token_ids:
    restrict the vocabulary. guided: holds the output to a schema, an expression or a grammar; None is free.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] | str = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    guided: Guided | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities (natural, after no temperature, penalties or filters: of the raw logits) at one position.

    position: of the token in the sequence. top_ids: int32, most likely first. top_logprobs: float32.
    rank: how many tokens of the vocabulary are at least as likely (1 is the most likely).
    """

    row: int
    position: int
    token_id: int
    logprob: float
    rank: int
    top_ids: bytes
    top_logprobs: bytes
