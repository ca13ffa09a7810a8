"""The gateway held to its own OpenAPI document by schemathesis: what it says it takes, and what it answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from .servekit import Server, serving

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
EXAMPLES = 8


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--http", "127.0.0.1:0", "--model-name", "tiny", "--dtype", "float32")
    with serving(tmp_path_factory.mktemp("server"), tiny, *options) as started:
        yield started
        assert "Traceback" not in started.log.read_text()


def quick(body: Any) -> Any:
    """The same request for less: what is generated at random would generate for long."""
    if not isinstance(body, dict):
        return body
    short = dict(body)
    for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("max_output_tokens", 4), ("n", 2)):
        if isinstance(short.get(name), int):
            short[name] = min(short[name], most)
    if isinstance(short.get("best_of"), int):
        short["best_of"] = short.get("n") or 1
    short.pop("model", None)
    return short


@pytest.mark.parametrize(
    ("mode", "more"),
    [(GenerationMode.POSITIVE, []), (GenerationMode.NEGATIVE, [checks.negative_data_rejection])],
    ids=["what it takes", "what it does not"],
)
def test_every_operation_keeps_to_the_document(server: Server, mode: GenerationMode, more: list[Any]) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue
        seen.add(operation.label)

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def keeps(case: Case) -> None:
            if mode is GenerationMode.POSITIVE:
                case.body = quick(case.body)
            case.call_and_validate(checks=[*CHECKS, *more])

        keeps()
    assert len(seen) == (9 if mode is GenerationMode.POSITIVE else 5)
