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
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks, schemas

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
# What it would import in the middle of a test, beside threads that import too: CPython 3.11's parser may fail then.
_EARLY = (schemas,)


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--http", "127.0.0.1:0", "--model-name", "tiny", "--dtype", "float32")
    with serving(tmp_path_factory.mktemp("server"), tiny, *options) as started:
        yield started
        assert "Traceback" not in started.log.read_text()


# What no schema can say: ids of this vocabulary, what goes with what, and what this model's template has.
UNSAID = (
    "model logit_bias allowed_token_ids banned_token_ids stop_token_ids min_tokens tools tool_choice response_format "
    "text structured_outputs previous_response_id top_logprobs logprobs chat_template_kwargs best_of instructions "
    "stream_options"
)


def quick(path: str, body: Any) -> Any:
    """The same request for less, and of this model: what is generated at random would mostly be refused."""
    if not isinstance(body, dict):
        return body
    short = {name: value for name, value in body.items() if name not in UNSAID.split()}
    for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("max_output_tokens", 4), ("n", 1)):
        if isinstance(short.get(name), int):
            short[name] = max(1, min(short[name], most))
    if path.endswith("/chat/completions") and isinstance(short.get("messages"), list):
        short["messages"] = [  # only a message of calls may have no content
            {**message, "content": message.get("content") or "a"} if isinstance(message, dict) else message
            for message in short["messages"]
        ]
    if path == "/tokenize":
        short.pop("messages", None)
        short["prompt"] = str(short.get("prompt"))
    elif path == "/detokenize" or not isinstance(short.get("prompt", ""), str):
        short["tokens" if path == "/detokenize" else "prompt"] = [1, 2, 3]
    return short


def hold(operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, more: list[Any]) -> set[int]:
    """Sends requests and checks the answers; returns the statuses that came."""
    statuses = set()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    def keeps(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            case.body = quick(case.path, case.body)
        statuses.add(case.call_and_validate(checks=[*CHECKS, *more]).status_code)

    keeps()
    return statuses


@pytest.mark.parametrize(
    ("mode", "more"),
    [(GenerationMode.POSITIVE, []), (GenerationMode.NEGATIVE, [checks.negative_data_rejection])],
    ids=["what it takes", "what it does not"],
)
def test_every_operation_keeps_to_the_document(server: Server, mode: GenerationMode, more: list[Any]) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    if mode is GenerationMode.NEGATIVE:
        operations = [operation for operation in operations if operation.body]
    assert len(operations) == (10 if mode is GenerationMode.POSITIVE else 5)
    for operation in operations:
        statuses = hold(operation, mode, more)
        expected = 404 if "{model}" in operation.label else 200 if mode is GenerationMode.POSITIVE else 400
        assert expected in statuses, f"{operation.label}: only {statuses}"
