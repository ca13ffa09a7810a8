"""Every endpoint, once: from this table come the routes and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from .bodies import (
    DetokenizeAnswer,
    DetokenizeRequest,
    HealthAnswer,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeRequest,
)
from .chat import create_chat_completion
from .chat_bodies import ChatCompletion, ChatRequest
from .completion_bodies import Completion, CompletionRequest
from .completions import create_completion
from .gateway import Gateway
from .responses import create_response
from .responses_bodies import ResponseObject, ResponsesRequest
from .status import get_model, health, list_models, live, metrics
from .tokens import detokenize, tokenize

Handler = Callable[[Gateway, Request], Awaitable[ASGIApp]]


@dataclass(frozen=True, slots=True)
class Operation:
    """takes, gives: structs of the bodies; None where there is none, or it is not JSON. generates: may be refused for
    load, and may stream. guarded: needs an API key, where the gateway has keys."""

    method: str
    path: str
    handler: Handler
    about: str
    takes: Any = None
    gives: Any = None
    generates: bool = False
    guarded: bool = True


OPERATIONS = (
    Operation("GET", "/v1/models", list_models, "What is served.", gives=ModelList),
    Operation("GET", "/v1/models/{model:path}", get_model, "One model.", gives=ModelCard),
    Operation(
        "POST",
        "/v1/completions",
        create_completion,
        "Continue a text.",
        takes=CompletionRequest,
        gives=Completion,
        generates=True,
    ),
    Operation(
        "POST",
        "/v1/chat/completions",
        create_chat_completion,
        "The next message of a conversation.",
        takes=ChatRequest,
        gives=ChatCompletion,
        generates=True,
    ),
    Operation(
        "POST",
        "/v1/responses",
        create_response,
        "The next message of a conversation, in OpenAI's newer form.",
        takes=ResponsesRequest,
        gives=ResponseObject,
        generates=True,
    ),
    Operation("POST", "/tokenize", tokenize, "Text to tokens.", takes=TokenizeRequest, gives=TokenizeAnswer),
    Operation("POST", "/detokenize", detokenize, "Tokens to text.", takes=DetokenizeRequest, gives=DetokenizeAnswer),
    Operation("GET", "/health", health, "200 while the service makes progress.", gives=HealthAnswer, guarded=False),
    Operation("GET", "/health/live", live, "503 when a restart would help.", gives=HealthAnswer, guarded=False),
    Operation("GET", "/metrics", metrics, "Metrics for Prometheus.", guarded=False),
)
