"""`/v1/responses`: what comes in and goes out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .bodies import StreamOptions
from .chat_bodies import Name, Role
from .sampling import Count, SamplingFields, Top
from .token_texts import ChatLogprob

LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputPart(msgspec.Struct):
    """text parts only."""

    type: Literal["input_text", "output_text", "text"]
    text: str


class InputItem(msgspec.Struct):
    """A message (`role`, `content`), a call that the model made, or what it gave. `reasoning` items are left out."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Role | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ResponseTool(msgspec.Struct):
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenTool(msgspec.Struct):
    type: Literal["function"]
    name: str


class TextFormat(msgspec.Struct):
    """schema: of "json_schema". The other fields are accepted, without effect."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct):
    """verbosity: accepted, without effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """input: a text, or a list of items. Nothing is stored: `previous_response_id` is refused, `store` has no effect.

    include: `message.output_text.logprobs` is the only thing that can be added. n: 1.
    """

    input: Annotated[str, Meta(min_length=1)] | Annotated[list[InputItem], Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    top_logprobs: Top | None = None
    reasoning: dict[str, Any] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    background: Literal[False] | None = None
    previous_response_id: str | None = None
    max_tool_calls: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class OutputText(msgspec.Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatLogprob] = []


class OutputMessage(msgspec.Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    status: Status
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(msgspec.Struct, tag_field="type", tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


class InputDetails(msgspec.Struct):
    cached_tokens: int


class OutputDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(msgspec.Struct):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(msgspec.Struct):
    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """What was asked is said again, as clients expect."""

    id: str
    created_at: int
    model: str
    status: Status
    output: list[OutputMessage | OutputCall] = []
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    text: TextOptions
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    tools: list[ResponseTool] = []
    truncation: Literal["disabled"] = "disabled"
    object: Literal["response"] = "response"
