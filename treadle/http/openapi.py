"""The OpenAPI 3.1 document, made from the structs that decode and encode the bodies."""

from __future__ import annotations

from typing import Any

import msgspec

from .errors import ErrorBody
from .operations import OPERATIONS, Operation

_REF = "#/components/schemas/{name}"
_REFUSALS = {
    400: "The request is wrong; the error says what is allowed.",
    401: "An API key is missing or unknown.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body does not come as application/json.",
    429: "Too much is asked of the service now; Retry-After says when to come again.",
    500: "The request could not be finished.",
    503: "The service is not there, or makes no progress.",
    504: "The request did not finish in its time.",
}


def openapi_document(version: str) -> dict[str, Any]:
    kinds = [ErrorBody, *{kind for op in OPERATIONS for kind in (op.takes, op.gives) if kind is not None}]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    refs = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for op in OPERATIONS:
        paths.setdefault(op.path.replace(":path", ""), {})[op.method.lower()] = _operation(op, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Treadle", "version": version, "description": "OpenAI-compatible inference."},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(op: Operation, refs: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "operationId": op.handler.__name__,
        "summary": op.about,
        "responses": {str(status): answer for status, answer in sorted(_answers(op, refs).items())},
    }
    if op.guarded:
        made["security"] = [{"key": []}, {}]  # the second: a gateway without keys
    if op.takes is not None:
        made["requestBody"] = {"required": True, "content": _json(refs[op.takes])}
    if "{" in op.path:
        made["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return made


def _answers(op: Operation, refs: dict[Any, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    content: dict[str, Any] = (
        _json(refs[op.gives]) if op.gives is not None else {"text/plain": {"schema": {"type": "string"}}}
    )
    if op.generates:
        # Of one event, since OpenAPI 3.1 has no schema for a stream of them.
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    answers: dict[int, dict[str, Any]] = {200: {"description": "OK", "content": content}}
    for status in _statuses(op):
        answers[status] = {"description": _REFUSALS[status], "content": _json(refs[ErrorBody])}
    if op.path.startswith("/health"):
        answers[503] = {"description": _REFUSALS[503], "content": _json(refs[op.gives])}
    if 429 in answers:
        seconds = {"description": "Seconds.", "schema": {"type": "integer"}}
        answers[429]["headers"] = {"Retry-After": seconds}
    return answers


def _statuses(op: Operation) -> list[int]:
    found = [401, 404, 503] if op.guarded else []
    found += [400, 408, 413, 415] if op.takes is not None else []
    return found + ([429, 500, 504] if op.generates else [])


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
