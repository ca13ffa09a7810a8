"""The fields of a request that say how to sample: OpenAI's, and beside them those of vLLM's server."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from treadle.transport import params as limits
from treadle.transport.messages import Guided, SamplingParams

from .errors import bad_request

_INT32 = (1 << 31) - 1
_INT64 = (1 << 63) - 1

TokenId = Annotated[int, Meta(ge=0, le=_INT32)]
Penalty = Annotated[float, Meta(ge=-limits.MAX_PENALTY, le=limits.MAX_PENALTY)]
StopText = Annotated[str, Meta(min_length=1, max_length=limits.MAX_STOP_LENGTH)]
StopTexts = Annotated[list[StopText], Meta(max_length=limits.MAX_STOP_STRINGS)]
Count = Annotated[int, Meta(ge=1, le=_INT32)]
Top = Annotated[int, Meta(ge=0, le=limits.MAX_LOGPROBS)]


class SamplingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """None, as everywhere in these bodies, is "not given". Defaults are OpenAI's, which are those of SamplingParams."""

    n: Annotated[int, Meta(ge=1, le=limits.MAX_N)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=limits.MAX_TEMPERATURE)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: StopText | StopTexts | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-limits.MAX_BIAS, le=limits.MAX_BIAS)]] | None = None
    # vLLM's
    top_k: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=limits.MAX_REPETITION_PENALTY)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=_INT32)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=limits.MAX_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=limits.MAX_TOKEN_IDS)] | None = None
    banned_token_ids: Annotated[list[TokenId], Meta(max_length=limits.MAX_TOKEN_IDS)] | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: Guided | None = None
    priority: Annotated[int, Meta(ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)] | None = None
    cache_salt: Annotated[str, Meta(max_length=limits.MAX_SALT)] | None = None
    # accepted, because clients send them, and without effect here
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "logit_bias",
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "allowed_token_ids",
    "banned_token_ids",
    "skip_special_tokens",
)


def sampling_params(
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    skip_special_tokens: bool | None = None,
    guided: Guided | None = None,
) -> SamplingParams:
    """What `fields` ask for; `check_params` (in `generate`) has the last word on values.

    skip_special_tokens: what to do where the request does not say. guided: what the answer must be, by another field
    than `structured_outputs`. Raises ApiError when both are given.
    """
    if guided is not None and fields.structured_outputs is not None:
        raise bad_request("structured_outputs together with a response format: give one of them", "structured_outputs")
    all_given = msgspec.structs.asdict(fields)
    given = {name: all_given[name] for name in _SAME_NAME if all_given[name] is not None}
    if skip_special_tokens is not None:
        given.setdefault("skip_special_tokens", skip_special_tokens)
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        guided=guided or fields.structured_outputs,
    )
