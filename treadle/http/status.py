"""What is served, and how it fares: `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from treadle.errors import TreadleError
from treadle.transport.messages import ServiceMetrics, Stats

from .bodies import HealthAnswer, ModelCard, ModelList
from .errors import ApiError
from .gateway import Gateway
from .link import Served
from .metrics import CONTENT_TYPE
from .streaming import encode as to_json

_STATS_SECONDS = 2.0
_DEAD = ("failed", "closed", "lost")


async def list_models(gateway: Gateway, request: Request) -> Response:
    return _json(ModelList(_cards(gateway, gateway.link.served)))


async def get_model(gateway: Gateway, request: Request) -> Response:
    name = request.path_params["model"]
    for card in _cards(gateway, gateway.link.served):
        if card.id == name:
            return _json(card)
    raise ApiError(404, f"the model {name!r:.200} does not exist", param="model", code="model_not_found")


async def health(gateway: Gateway, request: Request) -> Response:
    """200 only while steps end in time, or there is nothing to do."""
    found = await gateway.link.health()
    answer = HealthAnswer(found.state, found.detail, found.step, found.step_age)
    return Response(to_json(answer), 200 if found.state == "ready" else 503, media_type="application/json")


async def live(gateway: Gateway, request: Request) -> Response:
    """503 only when a restart would help: while engines load, hang or are replaced the service helps itself."""
    found = await gateway.link.health()
    answer = HealthAnswer(found.state, found.detail, found.step, found.step_age)
    return Response(to_json(answer), 503 if found.state in _DEAD else 200, media_type="application/json")


async def metrics(gateway: Gateway, request: Request) -> Response:
    found = await gateway.link.health()
    stats: Stats | None = None
    figures: ServiceMetrics | None = None
    model = ""
    try:
        served = gateway.link.served
        model = gateway.names(served)[0]
        async with asyncio.timeout(_STATS_SECONDS):
            stats = await served.frontend.stats()
            figures = await served.frontend.metrics()
    except (TreadleError, TimeoutError):
        pass  # what the gateway counted is shown all the same
    return Response(gateway.metrics.page(model, stats, figures, found), media_type=CONTENT_TYPE)


def _cards(gateway: Gateway, served: Served) -> list[ModelCard]:
    info = served.info
    return [ModelCard(name, served.created, info.max_model_len, info.model) for name in gateway.names(served)]


def _json(answer: ModelList | ModelCard) -> Response:
    return Response(to_json(answer), media_type="application/json")
