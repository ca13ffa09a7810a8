"""Answers that must be calls, held to the schemas of their functions: a grammar of what follows a forced beginning.

The rest of a call has the form that the model's template shows, and its arguments are JSON of the function's
parameters. Then the answer is over: one call, since what else the model would write is no call for sure.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from treadle.transport.messages import Guided

from .chat_bodies import FunctionTool
from .tool_formats import ToolFormat

ANY_OBJECT = {"type": "object"}
_WHITESPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
"""As everywhere in structured output: bounded, or a small model may go on with it for ever."""


def rest_of_call(format: ToolFormat, functions: Sequence[FunctionTool], named: bool) -> Guided:
    """What follows `format.forced(…)`. functions: that may be called. named: the beginning has the name already."""
    end = "}" + ("]" if format.listed else "")
    rules = []
    starts = []
    for place, function in enumerate(functions):
        name = [] if named else [json.dumps(f'{function.name}", "{format.key}": ')]
        starts.append(" ".join([*name, f"arguments_{place}", json.dumps(end)]))
        rules.append(f"arguments_{place}: %json {json.dumps(arguments_schema(function))}")
    return Guided(grammar="\n".join([f"start: {' | '.join(starts)}", *rules]))


def arguments_schema(function: FunctionTool) -> dict[str, Any]:
    """Arguments are an object, whatever the schema leaves open; strict ones have nothing that it does not name."""
    schema = ANY_OBJECT | (function.parameters or {})
    if function.strict:
        schema = {"additionalProperties": False} | schema
    return schema if "x-guidance" in schema else schema | {"x-guidance": _WHITESPACE}
