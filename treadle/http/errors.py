"""What goes wrong, in the shape that OpenAI's clients understand."""

from __future__ import annotations

import math
import re

import msgspec

from treadle.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ServiceError,
    TreadleError,
    Unsatisfiable,
)

from .allowed import allowed_at, known_at

_RETRY_SECONDS = 1
_AT = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_NOT_ONE_OF = re.compile(r"Invalid (?:enum )?value ")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")
_GUIDED = re.compile(r"(ignore_eos and )?guided(\.\w+)?\b")


class ErrorDetail(msgspec.Struct):
    """message: for people. type, code: for programs. param: the field of the request that is wrong, where one is."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class ApiError(Exception):
    """An answer other than 200. retry_after: whole seconds, for the header of that name; 0 is none."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int = 0,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message, type, param, code)
        self.retry_after = retry_after

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))

    @property
    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


class ClientGone(Exception):
    """Whoever asked has closed the connection: there is nobody to answer."""


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_validation(error: msgspec.ValidationError, kind: object) -> ApiError:
    """A body that is JSON and not what the endpoint takes, which is a `kind`; `param` is where."""
    text = str(error)
    at = _AT.search(text)
    path = at.group(1) if at else ""
    unknown = _UNKNOWN.search(text)
    if unknown:
        allowed = known_at(kind, path, unknown[1])
        path = f"{path}.{unknown[1]}".lstrip(".")
    else:
        allowed = allowed_at(kind, path) if _NOT_ONE_OF.match(text) else ""
    text = text.replace("`$.", "`").replace("`$`", "the body")
    return bad_request(f"{text}; allowed: {allowed}" if allowed else text, path or None)


def from_treadle(error: TreadleError, guided: str = "") -> ApiError:
    """The status of a typed error: 400 the caller's, 429 and 503 later or elsewhere, 500 and 504 ours.

    guided: the field of the body that became `SamplingParams.guided`, of which it does not know.
    """
    text, param = _as_written(str(error), guided)
    if isinstance(error, PromptTooLong):
        return bad_request(text, code="context_length_exceeded")
    if isinstance(error, InvalidRequest | Unsatisfiable):
        return bad_request(text, param, error.code)
    if isinstance(error, Overloaded):
        seconds = max(1, math.ceil(error.retry_after))
        return ApiError(429, text, type="rate_limit_error", code=error.code, retry_after=seconds)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, text, type="server_error", code=error.code)
    if isinstance(error, ServiceError):
        return ApiError(503, text, type="service_unavailable", code=error.code, retry_after=_RETRY_SECONDS)
    return ApiError(500, text, type="server_error", code=error.code)


def _as_written(text: str, guided: str) -> tuple[str, str | None]:
    """What is said of a grammar with its name in the body, and that name; only `structured_outputs` has its parts."""
    found = _GUIDED.match(text)
    if found is None or not guided:
        return text, None
    name = guided + (found[2] or "") if guided == "structured_outputs" else guided
    return f"{found[1] or ''}{name}{text[found.end() :]}", name
