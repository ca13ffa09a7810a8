"""Answers that may be text or calls, as the model likes: a grammar that lets text be and holds calls to their schemas.

Text is any UTF-8 and any tokens until the mark of the format that opens a call; what follows the mark is a call of a
function that there is. A strict function's arguments are of its schema, those of others any object. A tokenizer may
have a mark as one token, and a model may also write it letter by letter: both are read as one, so both open a call.

In llguidance's notation a `lazy` rule ends with the first mark that it meets, and `<[1,5-7]>` is one of these tokens,
which no expression for text matches.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from treadle.transport.messages import Guided

from .chat_bodies import FunctionTool
from .tool_formats import HERMES, MISTRAL, ToolFormat
from .tool_grammars import ANY_OBJECT, arguments_schema

_ARGS = "[ARGS]"
_SHARED = r"""
TEXT: /(?s:.*)/
WS: /[ \n\r\t]{0,64}/
one: "{" inner
inner: WS (typed WS "," WS)? "\"name\"" WS ":" WS named WS "}"
typed: "\"type\"" WS ":" WS "\"function\""
key: WS "," WS ("\"arguments\"" | "\"parameters\"") WS ":" WS
"""


def text_or_calls(format: ToolFormat, functions: Sequence[FunctionTool], added: Mapping[str, int]) -> Guided:
    """What an answer may be when the choice is "auto". added: `Tokenizer.added_tokens`."""
    others = [id for token, id in added.items() if token != format.opens]
    piece = f"TEXT {_one_of(others)}" if others else None
    rules = [*_shape(format, added, piece), _SHARED, *_functions(functions)]
    if format is MISTRAL:
        rules.append(_direct(functions, added))
    return Guided(grammar="\n".join(rules))


def _shape(format: ToolFormat, added: Mapping[str, int], piece: str | None) -> list[str]:
    """`start`, and how calls stand in a text. piece: text up to another added token, None where there are none."""
    rules = [*_opening("open", "TEXT", format, added)]
    pieces = ""
    if piece is not None:
        rules.append(f"piece: {piece}")
        pieces = "piece* "
    if format is HERMES:
        either = "(piece | call)*" if piece is not None else "call*"
        return [*rules, f"start: {either} TEXT", f"call: open WS one WS {_mark(format.closes, added)}"]
    rest = f"{pieces}(TEXT | open calls)"
    if format is MISTRAL:
        listed = '"[" WS one (WS "," WS one)* WS "]"'
        return [*rules, f"start: {rest}", f"calls: WS ({listed} | direct) WS"]
    return [*rules, *_bare(format, added, piece, rest), 'calls: WS one (WS ";" WS one)* WS']


def _bare(format: ToolFormat, added: Mapping[str, int], piece: str | None, rest: str) -> list[str]:
    """A call may begin without a mark, with a brace: then no text does, for it would be taken for a call."""
    special = f" | {piece.replace('TEXT', 'FIRST', 1)} {rest}" if piece is not None else ""
    return [
        f"start: bare | FIRST | first_open calls{special}",
        'bare: BRACE inner (WS ";" WS one)* WS',
        r"BRACE: /[\s\x1c-\x1f]{0,64}\{/",
        r"FIRST: /[\s\x1c-\x1f]*([^{\s\x1c-\x1f](?s:.*))?/",
        *_opening("first_open", "FIRST", format, added),
    ]


def _opening(name: str, text: str, format: ToolFormat, added: Mapping[str, int]) -> list[str]:
    """Text that ends with the mark of a call, as one token or in letters."""
    written = f"{name}_written[lazy]: {text} {json.dumps(format.opens)}"
    token = added.get(format.opens)
    return [f"{name}: {name}_written" + (f" | {text} {_one_of([token])}" if token is not None else ""), written]


def _functions(functions: Sequence[FunctionTool]) -> list[str]:
    """The names, and what the arguments of each must be. A schema is a grammar of its own, so its references hold."""
    choices = [f"{json.dumps(json.dumps(one.name))} key arguments_{place}" for place, one in enumerate(functions)]
    return [f"named: {' | '.join(choices)}", *(_arguments(place, one) for place, one in enumerate(functions))]


def _arguments(place: int, function: FunctionTool) -> str:
    schema = arguments_schema(function if function.strict else FunctionTool(function.name, parameters=ANY_OBJECT))
    return f"arguments_{place}: %json {json.dumps(schema)}"


def _direct(functions: Sequence[FunctionTool], added: Mapping[str, int]) -> str:
    """`name[ARGS]{…}`, as newer models of Mistral's write."""
    mark = _mark(_ARGS, added)
    calls = " | ".join(f"{json.dumps(one.name)} {mark} WS arguments_{place}" for place, one in enumerate(functions))
    return f"direct: direct_call ({_mark(MISTRAL.opens, added)} WS direct_call)*\ndirect_call: {calls}"


def _mark(text: str, added: Mapping[str, int]) -> str:
    """A mark within a call, in letters or as one token."""
    return f"({json.dumps(text)} | {_one_of([added[text]])})" if text in added else json.dumps(text)


def _one_of(ids: Iterable[int]) -> str:
    """Tokens, as llguidance writes sets of them."""
    ranges: list[list[int]] = []
    for id in sorted(ids):
        if ranges and ranges[-1][1] == id - 1:
            ranges[-1][1] = id
        else:
            ranges.append([id, id])
    return "<[" + ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges) + "]>"
