"""Guided and free requests of every kind, and whether a text is what was asked for."""

from __future__ import annotations

import json
import re
from typing import Any

from treadle import Guided, SamplingParams

from .groupkit import Requests

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["cat", "dog", None]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LIST = 'start: "[" ITEM ("," ITEM){0,3} "]"\nITEM: /[a-f]{2,4}/\n'
KINDS: list[Guided | None] = [
    Guided(json=SCHEMA),
    None,
    Guided(regex=r"[0-9]{3}-(abc|x{2,9})"),
    Guided(choice=["yes", "no", 'per"haps\n']),
    None,
    Guided(grammar=LIST),
]
NEW_TOKENS = 64


def check(guided: Guided | None, text: str) -> None:
    """The text is what was asked for."""
    kind, source = guided.source if guided is not None else ("", "")
    if kind == "json":
        value = json.loads(text)
        assert list(value) == ["name", "size", "kind"] and len(value["name"]) <= 6
        assert type(value["size"]) is int and 0 <= value["size"] <= 999 and value["kind"] in ("cat", "dog", None)
    elif kind == "regex":
        assert re.fullmatch(source, text)
    elif kind == "choice":
        assert text in json.loads(source)
    elif kind == "grammar":
        assert re.fullmatch(r"\[[a-f]{2,4}(,[a-f]{2,4}){0,3}\]", text)


def params(index: int, guided: Guided | None, **more: Any) -> SamplingParams:
    given = {"temperature": float(index % 3 > 0), "top_p": 0.9 if index % 4 == 2 else 1.0, "seed": index, **more}
    return SamplingParams(max_tokens=NEW_TOKENS, guided=guided, ignore_eos=guided is None, **given)


def requests() -> Requests:
    """Guided and free ones in turn, some with what the fused sampler has not."""
    made: Requests = []
    for index in range(12):
        more = {7: {"logprobs": 2}, 8: {"repetition_penalty": 1.2}, 6: {"min_tokens": 3}}.get(index, {})
        prompt = [*range(40 + index, 40 + 3 * index + 5)]
        made.append((f"r{index}", prompt, params(index, KINDS[index % len(KINDS)], **more)))
    return made
