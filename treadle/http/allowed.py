"""What a field of a body may be, or be called, where msgspec says only that it is something else."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

_FEW = 16
_STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")


def allowed_at(kind: object, path: str) -> str:
    """The values that a `kind` takes at `path` ("messages[0].role"), as JSON; "" where they are not a few."""
    types, tags = _at(kind, path)
    values = [value for one in types if get_origin(one) is Literal for value in get_args(one)] + tags
    names = [json.dumps(value) for value in values]
    if names and any(_is_struct(one) for one in types):
        names.append("an object")
    return ", ".join(names)


def known_at(kind: object, path: str, unknown: str) -> str:
    """The fields of the object that a `kind` has at `path`; of many, those that are most like `unknown`, if any are."""
    structs = [one for one in _at(kind, path)[0] if _is_struct(one)]
    names = [field.encode_name for one in structs for field in msgspec.structs.fields(one)]
    like = difflib.get_close_matches(unknown[: 2 * max(map(len, names), default=0)], names)
    return ", ".join([*like, "…"] if len(names) > _FEW and like else names)


def _at(kind: object, path: str) -> tuple[list[Any], list[object]]:
    """The types that may stand at `path`, and where that is what tells structs apart, the tags."""
    types = list(_alternatives(kind))
    tags: list[object] = []
    for step in _STEP.findall(path):
        tags = [_tag(one) for one in types if _is_struct(one) and one.__struct_config__.tag_field == step]
        types = [deeper for one in types for deeper in _into(one, step)]
    return types, tags


def _alternatives(kind: object) -> Iterator[Any]:
    """The members of a union, without what is noted about them."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, UnionType):
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _into(kind: Any, step: str) -> Iterator[Any]:
    if step.startswith("["):
        if get_origin(kind) is list:
            yield from _alternatives(get_args(kind)[0])
    elif _is_struct(kind):
        for field in msgspec.structs.fields(kind):
            if field.encode_name == step:
                yield from _alternatives(field.type)


def _is_struct(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _tag(kind: type[msgspec.Struct]) -> object:
    return kind.__struct_config__.tag
