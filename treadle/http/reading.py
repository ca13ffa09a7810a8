"""A request's body: bounded in bytes and in time, then decoded into the struct that the endpoint takes."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from .errors import ApiError, ClientGone, bad_request, from_validation
from .settings import GatewaySettings

T = TypeVar("T")


async def read_body(request: Request, kind: type[T], settings: GatewaySettings) -> T:
    """Raises ApiError: 400 for what is not the JSON of a `kind`, 408, 413, 415. ClientGone when nobody waits."""
    # A page in somebody's browser may send any other type to a server on that machine without being asked first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must come with the header Content-Type: application/json")
    body = await _bytes(request, settings)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise from_validation(error, kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {error}") from error


async def _bytes(request: Request, settings: GatewaySettings) -> bytes:
    most = settings.max_body_bytes
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise _too_large(most)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {settings.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is too large: at most {most} bytes are allowed")
