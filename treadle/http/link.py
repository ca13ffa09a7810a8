"""The gateway's hold on a service, which may not be there yet, or go and come back as another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from treadle.errors import ServiceClosed, ServiceError, TreadleError
from treadle.frontend import Frontend
from treadle.tokenizer import Tokenizer
from treadle.transport.messages import Health, ServerInfo

from .tool_formats import ToolFormat, detect_format

logger = logging.getLogger("treadle")
_LOOK_SECONDS = 2.0
_RETRY_SECONDS = 0.5
_MISSES = 3
_RESTARTED = "the service was restarted; the gateway is connecting to the new one"


@dataclass(frozen=True, slots=True)
class Served:
    """What is behind the gateway now. tools: None when the chat template knows none. created: seconds since 1970."""

    frontend: Frontend
    info: ServerInfo
    tokenizer: Tokenizer | None
    tools: ToolFormat | None
    created: int

    @classmethod
    async def behind(cls, frontend: Frontend) -> Served:
        info = await frontend.server_info()
        tokenizer = frontend.tokenizer
        tools = detect_format(tokenizer.chat_template) if tokenizer is not None else None
        return cls(frontend, info, tokenizer, tools, int(time.time()))


class Link:
    """Over an open `LLM` or `Client` of somebody else (`to`), or over clients that it opens itself (`keep`).

    A kept link connects again until it succeeds. It looks every two seconds whether the service is still the same one,
    because another may have another model and another tokenizer.
    """

    def __init__(self) -> None:
        self._served: Served | None = None
        self._reason = "the gateway is connecting to the service"
        self._task: asyncio.Task[None] | None = None
        self.reached = asyncio.Event()

    @classmethod
    async def to(cls, frontend: Frontend) -> Link:
        """frontend: open, and closed by whoever opened it."""
        link = cls()
        link._served = await Served.behind(frontend)
        return link

    @classmethod
    def keep(cls, make: Callable[[], Frontend]) -> Link:
        """make: gives a frontend that is not open yet, each time the service has to be found again."""
        link = cls()
        link._task = asyncio.get_running_loop().create_task(link._keep(make))
        return link

    @property
    def served(self) -> Served:
        """Raises ServiceClosed, which says why, while nothing is behind the gateway."""
        if self._served is None:
            raise ServiceClosed(self._reason)
        return self._served

    async def health(self, seconds: float = 2.0) -> Health:
        """Asks the service; "starting" before the first connection, "lost" when it does not answer in time."""
        served = self._served
        if served is None:
            return Health(state="starting", detail=self._reason)
        try:
            async with asyncio.timeout(seconds):
                if not await _is_same(served):
                    return Health(state="lost", detail=_RESTARTED)
                return await served.frontend.health()
        except TimeoutError:
            return Health(state="lost", detail=f"the service did not answer within {seconds:g} s")
        except TreadleError as error:
            return Health(state="lost", detail=str(error))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _keep(self, make: Callable[[], Frontend]) -> None:
        while True:
            try:
                async with make() as frontend:
                    self._served = await Served.behind(frontend)
                    self.reached.set()
                    logger.info("the gateway serves %s", self._served.info.model)
                    await self._while_it_lasts(self._served)
            except TreadleError as error:
                if str(error) != self._reason:
                    logger.info("the gateway waits for the service: %s", error)
                self._reason = str(error)
            except Exception as error:  # whatever it is, another service may do better: nobody else looks at this task
                logger.exception("the gateway cannot use this service")
                self._reason = f"internal error: {type(error).__name__}"
            finally:
                self._served = None
            await asyncio.sleep(_RETRY_SECONDS)

    async def _while_it_lasts(self, served: Served) -> None:
        """Returns never; raises when the service is another, or has not answered several times.

        One slow answer means nothing: streams may be open, and the client judges for itself when they are lost.
        """
        misses = 0
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                same = await _is_same(served)
            except ServiceError:
                misses += 1
                if misses == _MISSES:
                    raise
                continue
            misses = 0
            if not same:
                raise ServiceClosed(_RESTARTED)


async def _is_same(served: Served) -> bool:
    """Whether the connection still reaches the service that it was made to; a new one may have another model."""
    return (await served.frontend.server_info()).incarnation == served.info.incarnation
