"""Who is asked. What a load generator needs of an endpoint, and our own over ZeroMQ."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

from treadle.client import Client
from treadle.errors import TreadleError
from treadle.transport.messages import SamplingParams

from .plan import Ask

Told = Callable[[int], None]
"""Called when something of an answer comes, with the tokens in it; 0 where the endpoint does not say."""


class Usage(NamedTuple):
    """Tokens of one request, as the endpoint counted them."""

    input: int
    output: int


class Refused(Exception):
    """The request failed. kind: what failures are counted by; the message is an example of it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Target(Protocol):
    async def ask(self, ask: Ask, told: Told) -> Usage:
        """Asks and reads to the end; leaving it aborts the request. Raises Refused."""


class ZmqTarget:
    """A service of this project, through an open `Client`."""

    def __init__(self, client: Client, temperature: float, ignore_eos: bool) -> None:
        self._client = client
        self._temperature = temperature
        self._ignore_eos = ignore_eos

    async def ask(self, ask: Ask, told: Told) -> Usage:
        params = SamplingParams(max_tokens=ask.output, temperature=self._temperature, ignore_eos=self._ignore_eos)
        try:
            stream = self._client.generate(ask.prompt, params, tenant=ask.tenant, priority=ask.priority)
        except TreadleError as error:
            raise Refused(type(error).__name__, str(error)) from error
        usage = Usage(0, 0)
        try:
            async for output in stream:
                if output.outputs[0].delta_token_ids:
                    told(len(output.outputs[0].delta_token_ids))
                usage = Usage(len(output.prompt_token_ids), len(output.token_ids))
        except TreadleError as error:
            raise Refused(type(error).__name__, str(error)) from error
        except asyncio.CancelledError:
            await stream.aclose()
            raise
        return usage
