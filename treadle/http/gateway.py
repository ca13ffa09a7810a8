"""What the handlers of one gateway share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from .auth import ApiKeys
from .errors import ApiError
from .exchange import Exchange
from .link import Link, Served
from .metrics import Metrics
from .settings import GatewaySettings

_LONG_TEXT = 4096
T = TypeVar("T")


class Gateway:
    def __init__(self, link: Link, settings: GatewaySettings, keys: ApiKeys) -> None:
        self.link = link
        self.settings = settings
        self.keys = keys
        self.metrics = Metrics()

    def names(self, served: Served) -> list[str]:
        """What clients may call the model; the first is its name in answers."""
        return self.settings.model_names or [served.info.model]

    def serving(self, model: str | None) -> Served:
        """What serves `model`; None is whatever there is. Raises ApiError with 404, and ServiceClosed."""
        served = self.link.served
        names = self.names(served)
        if model is not None and model not in names:
            message = f"the model {model!r:.200} does not exist; there is {', '.join(names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return served

    def exchange(self, request: Request, served: Served) -> Exchange:
        """Raises ApiError with 429 when too many are open."""
        model = self.names(served)[0]
        return Exchange(request, self.metrics, model, self.settings.max_open_requests)


async def off_loop(function: Callable[[str], T], text: str) -> T:
    """Work on a text; on a thread when it is long, so that nobody else's stream waits for it."""
    return await asyncio.to_thread(function, text) if len(text) > _LONG_TEXT else function(text)
