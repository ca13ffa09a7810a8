"""What a benchmark of structured output asks for: prompts, and schemas that no output ever finishes."""

from __future__ import annotations

import random
from typing import Any

PROMPT_TOKENS = 64


def prompts(seed: int, rows: int, largest_id: int) -> list[list[int]]:
    """Random token ids, all different."""
    source = random.Random(seed)
    return [[source.randrange(1000, largest_id) for _ in range(PROMPT_TOKENS)] for _ in range(rows)]


def strings(number: int) -> dict[str, Any]:
    """Objects of bounded strings, which cost llguidance most: no two places in them are the same to it."""
    item = {
        f"name_{number}": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "kind": {"enum": ["person", "company", f"other_{number}"]},
    }
    return _endless(item)


def fields(number: int) -> dict[str, Any]:
    """Objects of numbers, dates, choices and flags."""
    item = {
        "id": {"type": "integer", "minimum": 0, "maximum": 10_000_000},
        "created": {"type": "string", "format": "date"},
        "state": {"enum": ["open", "in progress", "closed", "rejected", f"other_{number}"]},
        "price": {"type": "number", "minimum": 0, "maximum": 1000},
        "paid": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": [f"tag {i} of {number}" for i in range(20)]}, "maxItems": 4},
    }
    return _endless(item)


def _endless(item: dict[str, Any]) -> dict[str, Any]:
    """An array of objects that nobody finishes."""
    items = {"type": "object", "properties": item, "required": list(item), "additionalProperties": False}
    return {"type": "array", "items": items, "minItems": 10_000, "x-guidance": {"whitespace_flexible": False}}


SCHEMAS = {"strings": strings, "fields": fields}
