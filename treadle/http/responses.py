"""`/v1/responses`: OpenAI's newer form of a conversation. Nothing is kept between requests."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from treadle.outputs import RequestOutput
from treadle.tokenizer import Tokenizer
from treadle.transport.messages import Guided

from .chat_bodies import (
    CalledFunction,
    ChatMessage,
    FunctionTool,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from .errors import ApiError, bad_request
from .exchange import News
from .gateway import Gateway
from .generation import finish_of, needs_tokenizer, new_id, now, start
from .link import Served
from .prompting import ToolChoice, ToolPlan, chat_prompt, guided_by, guided_name, held_if_possible, plan_tools
from .reading import read_body
from .response_events import ResponseEvents
from .responses_bodies import (
    LOGPROBS,
    ChosenTool,
    Incomplete,
    InputDetails,
    InputItem,
    InputPart,
    OutputDetails,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    TextFormat,
    TextOptions,
)
from .sampling import sampling_params
from .streaming import EventStream
from .streaming import encode as to_json
from .token_texts import chat_logprobs
from .tool_stream import Found, ToolStream


async def create_response(gateway: Gateway, request: Request) -> Response | EventStream:
    body = await read_body(request, ResponsesRequest, gateway.settings)
    served = gateway.serving(body.model)
    _check(body)
    tools = _tools(body)
    plan = plan_tools(served, tools, _choice(body))
    request.state.guided = guided_name(body, plan, "text.format")
    return await held_if_possible(plan, partial(_answer, gateway, request, served, body, tools))


async def _answer(
    gateway: Gateway,
    request: Request,
    served: Served,
    body: ResponsesRequest,
    tools: list[Tool] | None,
    plan: ToolPlan | None,
) -> Response | EventStream:
    scored = LOGPROBS in (body.include or ())
    params = sampling_params(
        body,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if scored else None,
        skip_special_tokens=False if plan is not None and plan.format.special else None,
        guided=_guided(body, plan),
    )
    exchange = gateway.exchange(request, served)
    try:
        messages = conversation(body)
        prompt = await chat_prompt(served, messages, tools, plan, dict(body.chat_template_kwargs or {}))
        answer = _Answer(body, plan, needs_tokenizer(served, "a response"), gateway.names(served)[0])
        start(exchange, served, [prompt], params, body)
        if body.stream:
            return await EventStream.begin(exchange, answer)
        whole = answer.whole((await exchange.finals())[0])
    except BaseException:
        exchange.close()
        raise
    exchange.close()
    return Response(to_json(whole), media_type="application/json")


def conversation(body: ResponsesRequest) -> list[ChatMessage]:
    """The messages of a chat that say the same. Raises ApiError for an item that is not whole."""
    messages = [ChatMessage("system", body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return [*messages, ChatMessage("user", body.input)]
    for place, item in enumerate(body.input):
        if item.type == "reasoning":
            continue
        message = _message(place, item)
        before = messages[-1] if messages else None
        if item.type == "function_call" and before is not None and before.tool_calls and message.tool_calls:
            before.tool_calls += message.tool_calls  # calls made at once are one message
        else:
            messages.append(message)
    return messages


def _message(place: int, item: InputItem) -> ChatMessage:
    where = f"input[{place}]"
    if item.type == "function_call":
        if item.name is None or item.call_id is None:
            raise bad_request("a function_call needs name and call_id", where)
        call = ToolCall(CalledFunction(item.name, item.arguments or "{}"), item.call_id)
        return ChatMessage("assistant", tool_calls=[call])
    if item.type == "function_call_output":
        if item.output is None or item.call_id is None:
            raise bad_request("a function_call_output needs output and call_id", where)
        return ChatMessage("tool", _content(item.output), tool_call_id=item.call_id)
    if not item.role or item.content is None:
        raise bad_request("a message needs role and content", where)
    return ChatMessage(item.role, _content(item.content))


def _content(content: str | list[InputPart]) -> str | list[TextPart]:
    return content if isinstance(content, str) else [TextPart(part.text) for part in content]


def _check(body: ResponsesRequest) -> None:
    if body.previous_response_id is not None:
        raise bad_request("responses are not stored: send the whole conversation in input", "previous_response_id")
    if body.n not in (None, 1):
        raise bad_request("n must be 1: a response is one", "n")


def _guided(body: ResponsesRequest, plan: ToolPlan | None) -> Guided | None:
    asked = body.text.format if body.text is not None else None
    if asked is None:
        return guided_by(None, plan, body.structured_outputs)
    return guided_by(ResponseFormat(asked.type, {"schema": asked.schema}), plan, body.structured_outputs, "text.format")


def _tools(body: ResponsesRequest) -> list[Tool] | None:
    if body.tools is None:
        return None
    functions = [FunctionTool(tool.name, tool.description, tool.parameters, tool.strict) for tool in body.tools]
    return [Tool(function, "function") for function in functions]


def _choice(body: ResponsesRequest) -> ToolChoice:
    choice = body.tool_choice
    return NamedTool(NamedFunction(choice.name)) if isinstance(choice, ChosenTool) else choice


class _Answer:
    def __init__(self, body: ResponsesRequest, plan: ToolPlan | None, tokenizer: Tokenizer, model: str) -> None:
        self._top = (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None
        self._tokenizer = tokenizer
        self._tools = ToolStream(plan.format, plan.forced) if plan is not None else None
        self._response = ResponseObject(
            id=new_id("resp"),
            created_at=now(),
            model=model,
            status="in_progress",
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            text=TextOptions(TextFormat()),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
        )
        self._events = ResponseEvents(self._response)
        self._begun = False

    def whole(self, output: RequestOutput) -> ResponseObject:
        part = output.outputs[0]
        self._tell(output, part.text, len(part.token_ids))
        return self._response

    def block(self, news: News) -> bytes:
        head = b"" if self._begun else self._events.begin()
        self._begun = True
        part = news.output.outputs[0]
        return head + self._tell(news.output, part.delta, len(part.delta_token_ids))

    def last(self) -> bytes:
        return b""  # the last news says that it is the last

    def failure(self, error: ApiError) -> bytes:
        self._response.status = "failed"
        self._response.error = ResponseError(error.detail.code or "server_error", error.detail.message)
        return self._events.end()

    def _tell(self, output: RequestOutput, text: str, fresh: int) -> bytes:
        part = output.outputs[0]
        logprobs = []
        if self._top is not None and part.logprobs is not None:
            ids, tables = part.token_ids[len(part.token_ids) - fresh :], part.logprobs[len(part.logprobs) - fresh :]
            logprobs = chat_logprobs(self._tokenizer, ids, tables, self._top).content
        found = self._found(text, part.finish_reason is not None)
        made = self._events.text(found.text, logprobs) if found.text or logprobs else b""
        for call in found.calls:
            made += self._events.call(call)
        return made + self._end(output) if part.finish_reason is not None else made

    def _end(self, output: RequestOutput) -> bytes:
        prompt, written = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        details = InputDetails(output.cached_tokens)
        self._response.usage = ResponseUsage(prompt, details, written, OutputDetails(), prompt + written)
        self._response.status = "completed"
        if finish_of(output.outputs[0].finish_reason) == "length":
            self._response.status = "incomplete"
            self._response.incomplete_details = Incomplete()
        return self._events.end()

    def _found(self, text: str, last: bool) -> Found:
        if self._tools is None:
            return Found(text)
        found = self._tools.push(text)
        if last:
            rest = self._tools.finish()
            found = Found(found.text + rest.text, found.calls + rest.calls)
        return found
