"""One question, asked of a service again and again, whether it is there or not."""

from __future__ import annotations

import asyncio

from treadle.errors import ProtocolError, ServerLost
from treadle.remote import RemoteBackend
from treadle.transport.endpoints import ServerKeys, check_client
from treadle.transport.messages import Live


class LiveAsker:
    """Connects when it is asked, and again after every failure. Belongs to one loop.

    patience: seconds for an answer. Raises ConfigError here for an endpoint that cannot be one.
    """

    def __init__(self, endpoint: str, server_key: str | None, keys: ServerKeys | None, patience: float) -> None:
        check_client(endpoint, server_key)
        self.endpoint = endpoint
        self._server_key = server_key
        self._keys = keys
        self._patience = patience
        self._backend: RemoteBackend | None = None

    async def ask(self) -> Live:
        """Raises TreadleError: ServerLost when nobody answers in time, what the server refuses with, …"""
        try:
            async with asyncio.timeout(self._patience):
                if self._backend is None:
                    self._backend = await self._connected()
                answer = await self._backend.info("live")
        except TimeoutError:
            await self.close()
            raise ServerLost(f"{self.endpoint}: no answer within {self._patience:g} s") from None
        except BaseException:
            await self.close()
            raise
        if not isinstance(answer, Live):
            raise ProtocolError(f"{self.endpoint} answered {type(answer).__name__} where Live was expected")
        return answer

    async def check(self) -> None:
        """Raises TreadleError where no server is to be reached; one that is only starting is there."""
        self._backend = await self._connected()
        try:
            await self._backend.info("health")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.close()

    async def _connected(self) -> RemoteBackend:
        backend = RemoteBackend(
            self.endpoint, self._server_key, self._patience, lost_after=self._patience, keys=self._keys
        )
        try:
            await backend.start()
        except BaseException:
            await backend.close()
            raise
        return backend
