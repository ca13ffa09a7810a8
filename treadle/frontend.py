"""The methods that `LLM` and `Client` share: prompts in, streams out."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

import numpy as np

from treadle.errors import InvalidRequest, ServiceClosed, ServiceError, TreadleError
from treadle.tokenizer import Tokenizer
from treadle.transport.codec import pack
from treadle.transport.messages import Abort, Health, SamplingParams, ServerInfo, ServiceMetrics, Stats, Submit
from treadle.transport.params import MAX_ID_LENGTH, check_params, check_submit

from .backend import Backend
from .loop_thread import LoopThread
from .outputs import RequestOutput
from .stream import Stream
from .timeline import to_json

Prompt = str | Sequence[int]
_INT32_MAX = 2**31 - 1


class Frontend:
    """Base of `LLM` and `Client`. Use `async with`, or `with` and `generate_sync` in programs without a loop."""

    def __init__(self) -> None:
        self._made: Backend | None = None
        self._tokenizer: Tokenizer | None = None
        self._eos_token_ids: tuple[int, ...] = ()
        self._vocab_size: int | None = None
        self._open = False
        self._home: LoopThread | None = None
        self._labels: weakref.WeakValueDictionary[str, Stream] = weakref.WeakValueDictionary()

    # ── generation ──

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        trace_headers: Mapping[str, str] | None = None,
    ) -> Stream:
        """Starts a request and returns its stream at once.

        prompt: text, or token ids. timeout: seconds until the request fails with DeadlineExceeded. cache_salt: cached
        prefixes are shared only among requests of the same salt. priority: the lower number goes first. tenant: on
        whose account the request is, for fairness and bounds. trace_headers: "traceparent" and "tracestate" of the
        caller's span, for a service that traces requests. Must be called on a running event loop.

        Raises InvalidRequest here for what can be judged here; what only the service can judge (PromptTooLong,
        Overloaded, …) is raised by the stream.
        """
        self._must_be_open()
        params = params if params is not None else SamplingParams()
        check_params(params, self._vocab_size)
        if timeout == 0:
            raise InvalidRequest("timeout=0: allowed is None or a positive number of seconds")
        tokens = self._prompt_tokens(prompt)
        # The wire has an id of its own: what is still on its way to a stream that was left must not meet its successor.
        message = Submit(
            id=uuid.uuid4().hex,
            tokens=pack(tokens),
            params=params,
            timeout=0.0 if timeout is None else timeout,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            traceparent=_trace_header(trace_headers, "traceparent"),
            tracestate=_trace_header(trace_headers, "tracestate"),
        )
        check_submit(message)
        label = self._new_label(request_id or message.id)
        text = prompt if isinstance(prompt, str) else None
        stream = Stream(message, label, text, self._tokenizer, self._eos_token_ids, self._backend.abort)
        self._labels[label] = stream
        try:
            self._backend.submit(message, stream)
        except TreadleError:
            stream.disown()
            raise
        return stream

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        timeout: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = "",
        trace_headers: Mapping[str, str] | None = None,
    ) -> Stream:
        """Like `generate`, for a conversation: a list of {"role": …, "content": …} put through the chat template."""
        self._must_be_open()
        tokenizer = self._needs_tokenizer("chat")
        tokens = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
        return self.generate(
            tokens,
            params,
            request_id=request_id,
            timeout=timeout,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            trace_headers=trace_headers,
        )

    def generate_sync(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Blocks until all prompts are finished; for scripts and notebooks. One prompt gives a list of one."""
        batch = _as_batch(prompts)
        return self._sync_home().run(self._gather(batch, params))

    async def abort(self, request_id: str) -> None:
        """Ends a request of this object, whoever reads it; an unknown id is no error."""
        self._must_be_open()
        stream = self._labels.get(request_id)
        if stream is not None:
            self._backend.abort(Abort(stream.wire_id))

    # ── information ──

    async def stats(self) -> Stats:
        return _expect(await self._backend.info("stats"), Stats)

    async def metrics(self) -> ServiceMetrics:
        """What the service counts beside `stats`: times of steps and requests as histograms, figures by tenant."""
        return _expect(await self._backend.info("metrics"), ServiceMetrics)

    async def health(self) -> Health:
        """State of the service, judged by progress. Raises ServerLost when nobody answers."""
        return _expect(await self._backend.info("health"), Health)

    async def trace(self, seconds: float) -> bytes:
        """What scheduler, ranks and rows do in the next seconds, as JSON for ui.perfetto.dev or chrome://tracing.

        Of a server only over ipc: it shows what others do. Raises InvalidRequest, and Overloaded while it is recorded.
        """
        self._must_be_open()
        return to_json(await self._backend.record(seconds))

    async def server_info(self) -> ServerInfo:
        """What is served: the model's name, its vocabulary, the context limit, and which start of the service it is."""
        return _expect(await self._backend.info("server"), ServerInfo)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the model came without one."""
        self._must_be_open()
        return self._tokenizer

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._needs_tokenizer("tokenize").encode(text, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        tokenizer = self._needs_tokenizer("detokenize")
        return tokenizer.decode(_token_ids(token_ids, "token_ids"), skip_special_tokens=skip_special_tokens)

    # ── life ──

    async def start(self) -> None:
        """Makes the service ready; `async with` does it."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends all requests and everything this object started. Safe to call twice."""
        self._open = False
        if self._made is not None:
            await self._made.close()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __enter__(self) -> Self:
        self._home = LoopThread("treadle-sync")
        try:
            self._home.run(self.__aenter__())
        except BaseException:
            self._home.close()
            self._home = None
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._home is not None:
            self._home.run(self.close())
            self._home.close()
            self._home = None

    # ── inside ──

    def _new_label(self, label: object) -> str:
        if not isinstance(label, str) or len(label) > MAX_ID_LENGTH:
            raise InvalidRequest(f"request_id {label!r}: allowed is text of at most {MAX_ID_LENGTH} characters")
        used = self._labels.get(label)
        if used is not None and not used.ended:
            raise InvalidRequest(f"request_id {label!r} is in use: ids of open requests are unique")
        return label

    def _must_be_new(self) -> None:
        if self._made is not None:
            raise ServiceError(f"this {type(self).__name__} was started before: make another one")

    @property
    def _backend(self) -> Backend:
        if self._made is None:
            raise ServiceClosed(f"this {type(self).__name__} was not started")
        return self._made

    def _sync_home(self) -> LoopThread:
        if self._home is None:
            raise ServiceError(
                f"generate_sync works inside `with {type(self).__name__}(...) as …:`; under `async with` await generate"
            )
        return self._home

    async def _gather(self, prompts: Sequence[Prompt], params: SamplingParams | None) -> list[RequestOutput]:
        streams = [self.generate(prompt, params) for prompt in prompts]
        try:
            return [await stream.final() for stream in streams]
        finally:
            for stream in streams:
                stream.abort()

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequest("the prompt is empty: give text or at least one token id")
            return self._needs_tokenizer("a text prompt").encode(prompt)
        tokens = _token_ids(prompt, "prompt")
        if not tokens:
            raise InvalidRequest("the prompt is empty: give text or at least one token id")
        return tokens

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        self._must_be_open()
        if self._tokenizer is None:
            raise InvalidRequest(f"{what} needs a tokenizer, and this model came without one: send token ids")
        return self._tokenizer

    def _must_be_open(self) -> None:
        if not self._open:
            raise ServiceClosed(f"this {type(self).__name__} is not open: use `async with` or call start() first")


def _token_ids(values: object, what: str) -> list[int]:
    """Checked token ids of any sequence of ints, numpy's included."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, str | bytes | bytearray) or not isinstance(values, Sequence):
        raise InvalidRequest(f"{what} of type {type(values).__name__}: allowed are text and a sequence of token ids")
    for token in values:
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token <= _INT32_MAX:
            raise InvalidRequest(f"{what} with {token!r:.80}: token ids are integers from 0 to {_INT32_MAX}")
    return [int(token) for token in values]


def _trace_header(headers: object, name: str) -> str:
    """ "" where it is not given; other headers are nobody's business here."""
    if headers is None:
        return ""
    if not isinstance(headers, Mapping):
        raise InvalidRequest(
            f"trace_headers of type {type(headers).__name__}: a mapping from header to value is allowed"
        )
    return next((value for key, value in headers.items() if str(key).lower() == name), "")


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray) or not isinstance(prompts, Sequence):
        raise InvalidRequest(f"prompts of type {type(prompts).__name__}: allowed are a prompt and a list of prompts")
    if prompts and isinstance(prompts[0], int | np.integer):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


T = TypeVar("T")


def _expect(message: object, kind: type[T]) -> T:
    if not isinstance(message, kind):
        raise ServiceError(f"the service answered {type(message).__name__} where {kind.__name__} was expected")
    return message
