"""From the text of a request to generations under way."""

from __future__ import annotations

import time
import uuid
from typing import Literal

from treadle.tokenizer import Tokenizer
from treadle.transport.messages import SamplingParams

from .errors import bad_request
from .exchange import Exchange
from .gateway import off_loop
from .link import Served
from .sampling import SamplingFields

FinishReason = Literal["stop", "length"]


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def now() -> int:
    """Seconds since 1970, as answers carry them."""
    return int(time.time())


def needs_tokenizer(served: Served, what: str) -> Tokenizer:
    """Raises ApiError when the model came without one."""
    if served.tokenizer is None:
        raise bad_request(f"{what} needs a tokenizer, and this model came without one: send token ids")
    return served.tokenizer


async def encode(served: Served, text: str, special: bool) -> list[int]:
    """special: put what the model expects around a text, a beginning-of-sequence token mostly."""
    tokenizer = needs_tokenizer(served, "a text prompt")
    return await off_loop(lambda long: tokenizer.encode(long, add_special_tokens=special), text)


def start(
    exchange: Exchange, served: Served, prompts: list[list[int]], params: SamplingParams, fields: SamplingFields
) -> None:
    """Raises TreadleError for what can be judged at once."""
    exchange.start(served.frontend, prompts, params, priority=fields.priority, cache_salt=fields.cache_salt)


def finish_of(reason: str | None) -> FinishReason | None:
    """OpenAI's word for why a continuation ended; None while it runs."""
    if reason is None:
        return None
    return "length" if reason == "length" else "stop"
