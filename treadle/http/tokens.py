"""`/tokenize` and `/detokenize`, as vLLM's server has them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from .bodies import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from .errors import bad_request
from .gateway import Gateway, off_loop
from .generation import needs_tokenizer
from .prompting import role_for
from .reading import read_body
from .streaming import encode as to_json


async def tokenize(gateway: Gateway, request: Request) -> Response:
    body = await read_body(request, TokenizeRequest, gateway.settings)
    served = gateway.serving(body.model)
    tokenizer = needs_tokenizer(served, "tokenize")
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("one of prompt and messages is needed, and not both", "prompt")
    special = body.add_special_tokens is not False
    text = body.prompt
    if text is None:
        messages = [_named(message, tokenizer.chat_template) for message in body.messages or []]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=body.add_generation_prompt)
        special = bool(body.add_special_tokens)  # the template writes its own
    tokens = await off_loop(lambda long: tokenizer.encode(long, add_special_tokens=special), text)
    answer = TokenizeAnswer(len(tokens), served.info.max_model_len, tokens)
    if body.return_token_strs:
        answer.token_strs = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
    return _json(answer)


async def detokenize(gateway: Gateway, request: Request) -> Response:
    body = await read_body(request, DetokenizeRequest, gateway.settings)
    served = gateway.serving(body.model)
    tokenizer = needs_tokenizer(served, "detokenize")
    for token in body.tokens:
        if token >= served.info.vocab_size:
            raise bad_request(f"tokens: {token} is not an id; allowed are 0 to {served.info.vocab_size - 1}", "tokens")
    return _json(DetokenizeAnswer(tokenizer.decode(body.tokens, skip_special_tokens=False)))


def _json(answer: msgspec.Struct) -> Response:
    return Response(to_json(answer), media_type="application/json")


def _named(message: dict[str, Any], template: str) -> dict[str, Any]:
    """The role by the name that chat gives it, so that both count the same tokens."""
    role = message.get("role")
    return {**message, "role": role_for(role, template)} if isinstance(role, str) else message
