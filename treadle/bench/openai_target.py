"""An OpenAI endpoint, of whatever server: streaming, by aiohttp."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from treadle.errors import ConfigError, ServerLost

from .plan import Ask
from .target import Refused, Told, Usage

_PREFIX = b"data:"
_DONE = b"[DONE]"
_CONNECT_SECONDS = 30.0
_SHOWN = 300


class _Counts(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    """Any of these is something of an answer; the first chunk of a chat often has only the role."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def says(self) -> bool:
        if self.delta is None:
            return self.text is not None
        delta = self.delta
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Counts | None = None
    error: Any = None


class _Models(msgspec.Struct):
    class Card(msgspec.Struct):
        id: str

    data: list[Card]


class OpenAITarget:
    """POSTs to `/v1/completions`, or to `/v1/chat/completions` with `chat`. Use `async with`.

    url: with or without `/v1`. key: of the API, "" for none. extra: fields put into every body.
    Raises ServerLost on entering when the endpoint does not say what it serves and no model was named.
    """

    def __init__(
        self, url: str, *, model: str = "", key: str = "", chat: bool = False, extra: Mapping[str, Any] | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"base URL {url!r}: http://HOST:PORT or https://… is allowed")
        self._base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._chat = chat
        self._extra = dict(extra or {})
        self._decoder = msgspec.json.Decoder(_Chunk)
        self.model = model

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # how many are open is not for the client library to say
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            headers=self._headers,
            read_bufsize=1 << 20,
        )
        try:
            self.model = self.model or await self._served()
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, ask: Ask, told: Told) -> Usage:
        path = "/chat/completions" if self._chat else "/completions"
        data = msgspec.json.encode(self._body(ask))
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(self._base + path, data=data, headers=headers) as answer:
                if answer.status != 200:
                    text = (await answer.content.read(_SHOWN)).decode(errors="replace")
                    raise Refused(f"HTTP {answer.status}", text)
                return await self._read(answer, told)
        except aiohttp.ClientError as error:
            raise Refused(type(error).__name__, str(error)) from error

    def _body(self, ask: Ask) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "max_tokens": ask.output, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self._chat:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        if ask.priority:
            body["priority"] = ask.priority
        return body | self._extra

    async def _read(self, answer: aiohttp.ClientResponse, told: Told) -> Usage:
        usage, pieces, ended = None, 0, False
        async for data in _events(answer):
            if data == _DONE:
                ended = True
                break
            try:
                chunk = self._decoder.decode(data)
            except msgspec.DecodeError as error:
                raise Refused("BadEvent", f"{error} in {data[:_SHOWN]!r}") from error
            if chunk.error is not None:
                raise Refused("StreamError", str(chunk.error))
            for choice in chunk.choices:
                ended = ended or choice.finish_reason is not None
                if choice.says:
                    pieces += 1
                    told(0)
            usage = chunk.usage if chunk.usage is not None else usage
        if not ended:
            raise Refused("Incomplete", "the stream ended before the answer did")
        return Usage(usage.prompt_tokens, usage.completion_tokens) if usage is not None else Usage(0, pieces)

    async def _served(self) -> str:
        try:
            async with self._session.get(f"{self._base}/models") as answer:
                text = await answer.read()
                if answer.status != 200:
                    raise ServerLost(f"{self._base}/models answered {answer.status}: {text[:_SHOWN]!r}; give --model")
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerLost(f"{self._base}: {error}") from error
        try:
            return msgspec.json.decode(text, type=_Models).data[0].id
        except (msgspec.DecodeError, IndexError) as error:
            raise ServerLost(f"{self._base}/models names no model; give --model") from error


async def _events(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events. Lines may be long: they are put together here."""
    held = b""
    async for chunk in answer.content.iter_any():
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            if line.startswith(_PREFIX):
                yield line[len(_PREFIX) :].strip()
    if held.startswith(_PREFIX):
        yield held[len(_PREFIX) :].strip()
