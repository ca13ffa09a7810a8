"""The ASGI application: routes, the key at the door, and errors in one shape."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from treadle import __version__
from treadle.errors import TreadleError

from .auth import ApiKeys
from .errors import ApiError, ClientGone, from_treadle
from .gateway import Gateway
from .link import Link
from .openapi import openapi_document
from .operations import OPERATIONS, Operation
from .settings import GatewaySettings, check_settings
from .streaming import DIRECT_SEND
from .ui import PATHS as UI_PATHS
from .ui import ui_routes
from .viewers import Viewers

logger = logging.getLogger("treadle")
_CLIENT_GONE = 499  # nginx's number for it; nobody reads it but the metrics


def make_app(
    link: Link,
    settings: GatewaySettings | None = None,
    keys: ApiKeys | None = None,
    viewers: Viewers | None = None,
) -> ASGIApp:
    """An application for any ASGI server. Raises ConfigError.

    link: `await Link.to(llm)` for an open `LLM` or `Client`. keys: None reads those that the settings name.
    viewers: of the live page, for whoever wants to end their streams.
    """
    settings = settings if settings is not None else GatewaySettings()
    check_settings(settings)
    gateway = Gateway(link, settings, keys if keys is not None else ApiKeys.load(settings.api_keys))
    routes = [Route(op.path, _endpoint(gateway, op), methods=[op.method], name=op.path) for op in OPERATIONS]
    document = msgspec.json.encode(openapi_document(__version__))
    routes.append(Route("/openapi.json", partial(_document, document), name="/openapi.json"))
    routes += ui_routes(gateway, viewers if viewers is not None else Viewers(link, settings.model_names))
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _refuse, TreadleError: _fail, ClientGone: _nobody, HTTPException: _http_error},
    )
    return _Counted(app, gateway)


def _endpoint(gateway: Gateway, op: Operation) -> Callable[[Request], Awaitable[ASGIApp]]:
    async def endpoint(request: Request) -> ASGIApp:
        if op.guarded:
            request.state.tenant = gateway.keys.check(request.headers.get("authorization", ""))
        request.state.guided = "structured_outputs"  # where no other field of the body asks for a form
        try:
            return await op.handler(gateway, request)
        except (ApiError, ClientGone):
            raise
        except TreadleError as error:
            raise from_treadle(error, request.state.guided) from error
        except Exception as error:  # one request's trouble is said to its client, in the shape that it understands
            logger.exception("%s %s raised", op.method, op.path)
            raise ApiError(500, f"internal error: {type(error).__name__}", type="server_error") from error

    return endpoint


async def _document(document: bytes, request: Request) -> Response:
    return Response(document, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body, error.status, error.headers, media_type="application/json")


async def _fail(request: Request, error: Exception) -> Response:
    assert isinstance(error, TreadleError)
    return await _refuse(request, from_treadle(error))


async def _nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _http_error(request: Request, error: Exception) -> Response:
    """Of the router: no such path, no such method."""
    assert isinstance(error, HTTPException)
    what = "there is no such endpoint" if error.status_code == 404 else error.detail
    answer = ApiError(error.status_code, f"{request.method} {request.url.path:.200}: {what}")
    headers = {**answer.headers, **(error.headers or {})}
    return Response(answer.body, error.status_code, headers, media_type="application/json")


class _Counted:
    """Counts every answer by path, method and status. Paths that are no endpoint's are counted as one."""

    def __init__(self, app: Starlette, gateway: Gateway) -> None:
        self._app = app
        self._counter = gateway.metrics.http_requests
        self._paths = {op.path for op in OPERATIONS}.union(UI_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counter.labels(self._label(scope), scope["method"], str(message["status"])).inc()
            await send(message)

        scope[DIRECT_SEND] = send
        try:
            await self._app(scope, receive, count)
        finally:  # the server's object has the scope: both would live until the next collection of garbage
            del scope[DIRECT_SEND]

    def _label(self, scope: Scope) -> str:
        route = scope.get("path", "")
        if route in self._paths:
            return str(route)
        return "/v1/models/{model}" if route.startswith("/v1/models/") else "other"
