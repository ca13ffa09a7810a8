"""Answers as server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from treadle.errors import TreadleError

from .errors import ApiError, ClientGone, from_treadle
from .exchange import Exchange, News

logger = logging.getLogger("treadle")
encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"
DIRECT_SEND = "treadle.direct_send"
"""In the scope: the server's own `send`. The layers around it look at the start of an answer only, and every event
would go through each of them."""
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect what should be seen as it comes
]


def event(data: object) -> bytes:
    return b"data: %b\n\n" % encode(data)


def named_event(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), encode(data))


class Answer(Protocol):
    """What is said of an exchange. A block is one write, of one or more events; b"" says nothing."""

    def block(self, news: News) -> bytes: ...

    def last(self) -> bytes:
        """After the last news."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """Of an error that comes after the first block."""
        ...


class EventStream:
    """An ASGI answer of status 200.

    Made by `begin`, when the first block is there: what goes wrong before it has a status of its own.
    """

    def __init__(self, first: bytes, news: AsyncIterator[News], answer: Answer, exchange: Exchange) -> None:
        self._first = first
        self._news = news
        self._answer = answer
        self._exchange = exchange

    @classmethod
    async def begin(cls, exchange: Exchange, answer: Answer) -> EventStream:
        """Waits for the first block. Raises what comes instead of it."""
        first, news = b"", exchange.news()
        async for one in news:
            first = answer.block(one)
            if first:
                break
        return cls(first, news, answer, exchange)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct: Send = scope.get(DIRECT_SEND, send)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
            if self._first:
                await direct(part(self._first))
            await self._send_rest(direct)
            await direct({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._exchange.close()

    async def _send_rest(self, send: Send) -> None:
        try:
            tell = self._answer.block
            async for news in self._news:
                block = tell(news)
                if block:
                    await send(part(block))
            await send(part(self._answer.last()))
        except ClientGone:
            pass
        except TreadleError as error:
            await send(part(self._answer.failure(from_treadle(error, self._exchange.guided))))
        except Exception as error:  # the client has its 200: all that is left is to say so in the stream
            logger.exception("a stream raised")
            failed = ApiError(500, f"internal error: {type(error).__name__}", type="server_error")
            await send(part(self._answer.failure(failed)))


def plain_failure(error: ApiError) -> bytes:
    """An `error` event, as OpenAI's clients look for it, then the end."""
    return b"data: %b\n\n" % error.body + DONE


def part(body: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}
