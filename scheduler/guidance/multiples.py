"""How large the automaton is that a schema's `multipleOf` needs, which llguidance builds without a limit.

It has a state for each remainder, trailing zeros of the divisor aside. A million of them take 10 s and 0.4 GB
(llguidance 1.9.1), and a larger divisor all the memory that there is. Where several hold for one value, their least
common multiple counts. Whether they do is not asked here: they meet in `allOf`, by reference, and by patterns of names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import TypeAlias

from treadle.errors import InvalidParameter

_MOST = 200_000
_MOST_SCHEMAS = 256
_SCHEMA = re.compile(r"%json\s*(?={)")
_DECODER = json.JSONDecoder(parse_float=Decimal)
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | Decimal | bool | None"


def check_multiples(schema: str) -> None:
    """Raises InvalidParameter for a JSON schema whose `multipleOf` is too costly. What is not JSON passes."""
    try:
        root: Json = _DECODER.decode(schema)
    except (ValueError, RecursionError):
        return
    _check(root)


def check_grammar_multiples(grammar: str) -> None:
    """The same for each schema (`%json {…}`) in a Lark grammar. Raises InvalidParameter for too many of them, too.

    What looks like a schema may begin in a text, an expression or a comment, and then hold the beginning of a true one.
    So each is read from its own beginning, wherever another one ends, and that is why their number is limited.
    """
    for number, found in enumerate(_SCHEMA.finditer(grammar)):
        if number == _MOST_SCHEMAS:
            raise InvalidParameter(f"guided.grammar: more than {_MOST_SCHEMAS} schemas (%json)")
        try:
            root, _ = _DECODER.raw_decode(grammar, found.end())
        except (ValueError, RecursionError):
            continue
        _check(root)


def _check(root: Json) -> None:
    together = 1
    for divisor in _divisors(root):
        together = math.lcm(together, divisor)
        if together > _MOST:
            raise InvalidParameter(
                f"guided: multipleOf whose least common multiple is above {_MOST}, the decimal point and trailing "
                "zeros not counted"
            )


def _divisors(root: Json) -> Iterator[int]:
    """Without the decimal point and trailing zeros."""
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, list):
            stack.extend(node)
        elif isinstance(node, dict):
            stack.extend(node.values())
            value = node.get("multipleOf")
            if isinstance(value, int | Decimal) and Decimal(value).is_finite() and value > 0:
                yield int("".join(map(str, Decimal(value).as_tuple().digits)).rstrip("0"))
