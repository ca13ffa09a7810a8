"""`/v1/completions`: a text continued."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from treadle.outputs import CompletionOutput, RequestOutput
from treadle.tokenizer import Tokenizer
from treadle.transport.messages import SamplingParams

from .bodies import usage_of
from .completion_bodies import Completion, CompletionChoice, CompletionRequest
from .errors import ApiError, bad_request
from .exchange import News
from .gateway import Gateway
from .generation import encode, finish_of, needs_tokenizer, new_id, now, start
from .link import Served
from .reading import read_body
from .sampling import sampling_params
from .streaming import DONE, EventStream, event, plain_failure
from .streaming import encode as to_json
from .token_texts import CompletionScores

_DEFAULT_MAX_TOKENS = 16


async def create_completion(gateway: Gateway, request: Request) -> Response | EventStream:
    body = await read_body(request, CompletionRequest, gateway.settings)
    served = gateway.serving(body.model)
    params = _params(body)
    exchange = gateway.exchange(request, served)
    try:
        prompts = [await _tokens(served, body, prompt) for prompt in _prompts(body)]
        answer = _Answer(body, params.n, served, gateway.names(served)[0])
        start(exchange, served, prompts, params, body)
        if body.stream:
            return await EventStream.begin(exchange, answer)
        whole = answer.whole(await exchange.finals())
    except BaseException:
        exchange.close()
        raise
    exchange.close()
    return Response(to_json(whole), media_type="application/json")


def _params(body: CompletionRequest) -> SamplingParams:
    limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if limit == 0 and not body.echo:
        raise bad_request("max_tokens is 0: allowed with echo only, to score a text", "max_tokens")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise bad_request("best_of must equal n: completions are not ranked here", "best_of")
    if limit == 0 and body.stream:
        raise bad_request("max_tokens is 0: there is nothing to stream", "stream")
    echoed = body.logprobs if body.echo else None
    scored = body.prompt_logprobs if body.prompt_logprobs is not None else echoed
    return sampling_params(body, max_tokens=max(1, limit), logprobs=body.logprobs, prompt_logprobs=scored)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    try:
        return body.prompts()
    except ValueError as error:
        raise bad_request(str(error), "prompt") from error


async def _tokens(served: Served, body: CompletionRequest, prompt: str | list[int]) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    if not prompt:
        raise bad_request("the prompt is empty: give text or at least one token id", "prompt")
    return await encode(served, prompt, body.add_special_tokens is not False)


class _Answer:
    """Turns outputs into choices. A request of p prompts and n continuations has p × n choices, prompt by prompt."""

    def __init__(self, body: CompletionRequest, n: int, served: Served, model: str) -> None:
        self._body = body
        self._n = n
        self._tokenizer = served.tokenizer
        if body.echo or body.logprobs is not None or body.prompt_logprobs is not None:
            self._tokenizer = needs_tokenizer(served, "echo and logprobs")
        self._model = model
        self._id = new_id("cmpl")
        self._created = now()
        self._tellers: dict[int, _Teller] = {}
        self._newest: dict[int, RequestOutput] = {}

    def whole(self, outputs: list[RequestOutput]) -> Completion:
        if self._body.max_tokens == 0:
            _take_back_the_one_token(outputs)
        choices = []
        for place, output in enumerate(outputs):
            choices += [self._teller(place, part).whole(output, part) for part in output.outputs]
        answer = self._object(choices)
        answer.usage = usage_of(outputs)
        return answer

    def block(self, news: News) -> bytes:
        place, output = news
        self._newest[place] = output
        choices: list[CompletionChoice] = []
        for part in output.outputs:
            choice = self._teller(place, part).piece(output, part)
            if choice is not None:
                choices.append(choice)
        return event(self._object(choices)) if choices else b""

    def last(self) -> bytes:
        if self._body.stream_options is None or not self._body.stream_options.include_usage:
            return DONE
        answer = self._object([])
        answer.usage = usage_of(list(self._newest.values()))
        return event(answer) + DONE

    def failure(self, error: ApiError) -> bytes:
        return plain_failure(error)

    def _teller(self, place: int, part: CompletionOutput) -> _Teller:
        index = place * self._n + part.index
        if index not in self._tellers:
            self._tellers[index] = _Teller(index, self._body, self._tokenizer)
        return self._tellers[index]

    def _object(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices)


class _Teller:
    """What is said of one continuation."""

    def __init__(self, index: int, body: CompletionRequest, tokenizer: Tokenizer | None) -> None:
        self._index = index
        self._echo = bool(body.echo)
        self._skip = body.skip_special_tokens is not False
        self._tokenizer = tokenizer
        self._scores: CompletionScores | None = None
        if body.logprobs is not None and tokenizer is not None:
            self._scores = CompletionScores(tokenizer, body.logprobs, self._skip)
        self._top_of_prompt = body.prompt_logprobs
        self._begun = False
        self._done = False

    def whole(self, output: RequestOutput, part: CompletionOutput) -> CompletionChoice:
        return self._say(output, part, part.text, len(part.token_ids))

    def piece(self, output: RequestOutput, part: CompletionOutput) -> CompletionChoice | None:
        """What is new; None when that is nothing, or nothing certain yet."""
        fresh = len(part.delta_token_ids)
        begins = not self._begun and (fresh > 0 or part.finish_reason is not None)
        tells = part.delta or part.finish_reason or (fresh and self._scores) or (begins and self._echo)
        if self._done or not tells:
            return None
        return self._say(output, part, part.delta, fresh)

    def _say(self, output: RequestOutput, part: CompletionOutput, text: str, fresh: int) -> CompletionChoice:
        first, self._begun = not self._begun, True
        self._done = part.finish_reason is not None
        choice = CompletionChoice(index=self._index, text=text)
        choice.finish_reason = finish_of(part.finish_reason)
        choice.stop_reason = part.stop_reason
        echo = first and self._echo
        if echo and self._tokenizer is not None:
            choice.text = self._tokenizer.decode(output.prompt_token_ids, skip_special_tokens=self._skip) + text
        if self._scores is not None and part.logprobs is not None:
            ids = part.token_ids[len(part.token_ids) - fresh :]
            tables = part.logprobs[len(part.logprobs) - fresh :]
            prompt = output.prompt_token_ids if echo else []
            before = (output.prompt_logprobs or [])[: len(prompt)]
            choice.logprobs = self._scores.next([*prompt, *ids], [*before, *tables])
        if first and self._top_of_prompt is not None and self._tokenizer is not None:
            scores = CompletionScores(self._tokenizer, self._top_of_prompt, self._skip)
            choice.prompt_logprobs = scores.next(output.prompt_token_ids, output.prompt_logprobs or [])
        return choice


def _take_back_the_one_token(outputs: list[RequestOutput]) -> None:
    """With max_tokens=0 one token had to be generated; nobody asked for it."""
    for output in outputs:
        for part in output.outputs:
            part.token_ids, part.text, part.finish_reason, part.stop_reason = [], "", "length", None
            part.logprobs = None if part.logprobs is None else []
