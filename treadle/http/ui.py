"""The live page, `/ui`, and its stream of events, `/ui/events`.

The page is one file without anything from elsewhere, and the browser is told to allow nothing else. It shows nothing by
itself, so it is open; the stream needs a key where the gateway has keys.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .gateway import Gateway
from .streaming import SSE_HEADERS, part
from .viewers import Viewer, Viewers

PATHS = ("/ui", "/ui/events")


def ui_routes(gateway: Gateway, viewers: Viewers) -> list[Route]:
    page = (Path(__file__).parent / "ui.html").read_bytes()
    headers = {
        "content-security-policy": content_policy(page.decode()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    async def show(request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    async def watch(request: Request) -> ASGIApp:
        gateway.keys.check(request.headers.get("authorization", ""))
        return _Watch(viewers, viewers.enter())

    return [Route("/ui", show, name="/ui"), Route("/ui/events", watch, methods=["GET"], name="/ui/events")]


def content_policy(page: str) -> str:
    """Only the script and the style that stand in the page, by hash; requests to its own origin; nothing else."""
    script, style = (_hashes(page, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(page: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


class _Watch:
    """An ASGI answer that goes on until the viewer leaves or the gateway ends."""

    def __init__(self, viewers: Viewers, viewer: Viewer) -> None:
        self._viewers = viewers
        self._viewer = viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._viewers.leave(self._viewer)
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        while event := await self._viewer.next():
            await send(part(event))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
