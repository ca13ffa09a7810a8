"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from treadle.outputs import CompletionOutput, RequestOutput
from treadle.tokenizer import Tokenizer
from treadle.transport.messages import SamplingParams

from .bodies import usage_of
from .chat_bodies import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatFinish,
    ChatRequest,
    ChunkChoice,
    ToolCall,
)
from .errors import ApiError, bad_request
from .exchange import News
from .gateway import Gateway
from .generation import finish_of, needs_tokenizer, new_id, now, start
from .link import Served
from .prompting import ToolPlan, chat_prompt, guided_by, guided_name, held_if_possible, plan_tools
from .reading import read_body
from .sampling import sampling_params
from .streaming import DONE, EventStream, event, plain_failure
from .streaming import encode as to_json
from .token_texts import ChatLogprobs, chat_logprobs
from .tool_formats import Call
from .tool_stream import Found, ToolStream


async def create_chat_completion(gateway: Gateway, request: Request) -> Response | EventStream:
    body = await read_body(request, ChatRequest, gateway.settings)
    served = gateway.serving(body.model)
    plan = plan_tools(served, body.tools, body.tool_choice)
    request.state.guided = guided_name(body, plan)
    return await held_if_possible(plan, partial(_answer, gateway, request, served, body))


async def _answer(
    gateway: Gateway, request: Request, served: Served, body: ChatRequest, plan: ToolPlan | None
) -> Response | EventStream:
    params = _params(body, plan)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    exchange = gateway.exchange(request, served)
    try:
        prompt = await chat_prompt(served, body.messages, body.tools, plan, variables)
        answer = _Answer(body, plan, needs_tokenizer(served, "chat"), gateway.names(served)[0])
        start(exchange, served, [prompt], params, body)
        if body.stream:
            return await EventStream.begin(exchange, answer)
        whole = answer.whole((await exchange.finals())[0])
    except BaseException:
        exchange.close()
        raise
    exchange.close()
    return Response(to_json(whole), media_type="application/json")


def _params(body: ChatRequest, plan: ToolPlan | None) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    return sampling_params(
        body,
        max_tokens=limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        skip_special_tokens=False if plan is not None and plan.format.special else None,
        guided=guided_by(body.response_format, plan, body.structured_outputs),
    )


class _Answer:
    def __init__(self, body: ChatRequest, plan: ToolPlan | None, tokenizer: Tokenizer, model: str) -> None:
        self._body = body
        self._plan = plan
        self._tokenizer = tokenizer
        self._model = model
        self._id = new_id("chatcmpl")
        self._created = now()
        self._tellers: dict[int, _Teller] = {}
        self._newest: RequestOutput | None = None

    def whole(self, output: RequestOutput) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._teller(part.index).whole(part) for part in output.outputs],
            usage=usage_of([output]),
        )

    def block(self, news: News) -> bytes:
        self._newest = output = news.output
        chunks = [event(self._chunk([c])) for part in output.outputs for c in self._teller(part.index).pieces(part)]
        return b"".join(chunks)

    def last(self) -> bytes:
        options = self._body.stream_options
        if options is None or not options.include_usage or self._newest is None:
            return DONE
        chunk = self._chunk([])
        chunk.usage = usage_of([self._newest])
        return event(chunk) + DONE

    def failure(self, error: ApiError) -> bytes:
        return plain_failure(error)

    def _teller(self, index: int) -> _Teller:
        if index not in self._tellers:
            tools = ToolStream(self._plan.format, self._plan.forced) if self._plan is not None else None
            top = (self._body.top_logprobs or 0) if self._body.logprobs else None
            self._tellers[index] = _Teller(index, self._tokenizer, tools, top)
        return self._tellers[index]

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices)


class _Teller:
    """What is said of one continuation. top: alternatives beside each token; None is no log-probabilities."""

    def __init__(self, index: int, tokenizer: Tokenizer, tools: ToolStream | None, top: int | None) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._tools = tools
        self._top = top
        self._calls = 0
        self._last: Call | None = None
        self._begun = False
        self._done = False

    def whole(self, part: CompletionOutput) -> ChatChoice:
        found = self._found(part.text, True)
        message = AnswerMessage(content=found.text)
        if found.calls:
            message.content = found.text or None
            message.tool_calls = [_call(call) for call in found.calls]
        return ChatChoice(
            index=self._index,
            message=message,
            logprobs=self._logprobs(part, len(part.token_ids)),
            finish_reason=self._reason(part) or "stop",
            stop_reason=part.stop_reason,
        )

    def pieces(self, part: CompletionOutput) -> list[ChunkChoice]:
        """The chunks of what is new: the role first, then text, calls, and last why it ended."""
        if self._done:
            return []
        self._done = part.finish_reason is not None
        found = self._found(part.delta, self._done)
        logprobs = self._logprobs(part, len(part.delta_token_ids))
        made = []
        if not self._begun:
            self._begun = True
            made.append(self._piece(ChatDelta(role="assistant", content="")))
        if found.text or (logprobs is not None and logprobs.content):
            made.append(self._piece(ChatDelta(content=found.text)))
            made[-1].logprobs = logprobs
        for place, call in enumerate(found.calls, start=self._calls - len(found.calls)):
            made.append(self._piece(ChatDelta(tool_calls=[_call(call, place)])))
        if self._done:
            made.append(self._piece(ChatDelta()))
            made[-1].finish_reason = self._reason(part)
            made[-1].stop_reason = part.stop_reason
        return made

    def _piece(self, delta: ChatDelta) -> ChunkChoice:
        return ChunkChoice(index=self._index, delta=delta)

    def _found(self, text: str, last: bool) -> Found:
        if self._tools is None:
            return Found(text)
        found = self._tools.push(text)
        if last:
            rest = self._tools.finish()
            found = Found(found.text + rest.text, found.calls + rest.calls)
        self._calls += len(found.calls)
        if found.calls:
            self._last = found.calls[-1]
        return found

    def _reason(self, part: CompletionOutput) -> ChatFinish | None:
        reason = finish_of(part.finish_reason)
        if reason != "stop" or self._last is None:
            return reason
        cut = isinstance(part.stop_reason, str) and not _is_json(self._last.arguments)
        return reason if cut else "tool_calls"

    def _logprobs(self, part: CompletionOutput, fresh: int) -> ChatLogprobs | None:
        if self._top is None or part.logprobs is None:
            return None
        ids = part.token_ids[len(part.token_ids) - fresh :]
        return chat_logprobs(self._tokenizer, ids, part.logprobs[len(part.logprobs) - fresh :], self._top)


def _call(call: Call, index: int | None = None) -> ToolCall:
    return ToolCall(CalledFunction(call.name, call.arguments), new_id("call"), index=index)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except msgspec.DecodeError:
        return False
    return True
