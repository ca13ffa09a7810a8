"""`/v1/chat/completions`: what comes in and goes out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .bodies import StreamOptions, Usage
from .sampling import Count, SamplingFields, Top
from .token_texts import ChatLogprobs

ChatFinish = Literal["stop", "length", "tool_calls"]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[\w.:-]+$")]


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class CalledFunction(msgspec.Struct):
    """arguments: JSON, as text."""

    name: str
    arguments: str = ""


class ToolCall(msgspec.Struct, omit_defaults=True, tag_field="type", tag="function"):
    """index: its place, in the chunks of a stream."""

    function: CalledFunction
    id: str = ""
    index: int | None = None


class ChatMessage(msgspec.Struct, omit_defaults=True):
    """One message of a conversation. Fields that are not listed are left out, not refused: clients send back what they
    got from servers of many kinds."""

    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionTool(msgspec.Struct, omit_defaults=True):
    """parameters: a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    function: FunctionTool
    type: Literal["function"]


class NamedFunction(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct):
    function: NamedFunction
    type: Literal["function"] = "function"


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """max_tokens, max_completion_tokens: up to the context limit when neither is given.

    chat_template_kwargs: variables for the model's template (`{"enable_thinking": false}`). parallel_tool_calls,
    reasoning_effort and verbosity are accepted; the template sees `reasoning_effort`.
    """

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    model: str | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class AnswerMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish
    stop_reason: str | int | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinish | None = None
    stop_reason: str | int | msgspec.UnsetType | None = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
