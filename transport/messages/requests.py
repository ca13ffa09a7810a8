"""A request on its way: what a client asks for, and what it gets, step by step."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import field

from .base import Message
from .sampling import SamplingParams, TokenLogprobs


class Submit(Message, frozen=True, kw_only=True):
    """A request. tokens: int32 prompt. timeout: seconds from acceptance to the end, 0 is none.

    cache_salt: requests share cached prefixes only within one salt. With `params.n` > 1 the outputs carry `index`.
    tenant: on whose account, for policies and bounds by tenant.
    outputs: of a request that another server, or this one, had begun and lost: the output that the client has of each
    continuation, int32; none for a new request. ended: continuations that need nothing more. key: the client's secret
    name for the request, the same each time that it is sent; "" is for one that will not be sent again.
    traceparent, tracestate: of the caller's span, as W3C's Trace Context writes them; "" for none.
    """

    id: str
    tokens: bytes
    params: SamplingParams
    timeout: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    outputs: list[bytes] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    key: str = ""
    traceparent: str = ""
    tracestate: str = ""


class Abort(Message, frozen=True):
    """Ends a request, or with `index` one of its continuations (-1: all). An unknown id is no error."""

    id: str
    index: int = -1


class Delta(Message, frozen=True):
    """New tokens of one continuation of a request. finish: "" while it runs, else why it ended.

    finish is one of "stop" (EOS or a stop token id; `stop_token` says which, or -1), "length", "abort", "deadline",
    "error" (then `error_code` and `error` say what).
    """

    id: str
    index: int
    tokens: list[int]
    finish: str = ""
    stop_token: int = -1
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error_code: str = ""
    error: str = ""


class Deltas(Message, frozen=True):
    """Service → client: what one step brought to all its requests.

    tokens: by request id, where one token of continuation 0 is all there is to say, as nearly always. items: the rest.
    number: counts from 1 within a session.
    """

    items: list[Delta]
    tokens: dict[str, int] = field(default_factory=dict)
    number: int = 0

    def each(self) -> Iterator[Delta]:
        """Everything in the long form, for readers that do not mind an object per token."""
        yield from (Delta(request_id, 0, [token]) for request_id, token in self.tokens.items())
        yield from self.items


class Refused(Message, frozen=True):
    """The message with this id was not accepted (id "" where it could not be read)."""

    id: str
    code: str
    message: str
    retry_after: float = 0.0
