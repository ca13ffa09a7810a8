"""How models write tool calls: the formats of published chat templates, recognised by the template's own words.

A template that does not name `tools` cannot tell the model of any, so such a model has no format. The formats:

- hermes: `<tool_call>{"name": …, "arguments": …}</tool_call>` (Nous Hermes, Qwen 2.5 and 3, SmolLM)
- mistral: `[TOOL_CALLS][{"name": …, "arguments": …}]`, or `[TOOL_CALLS]name[ARGS]{…}` in newer ones
- llama: the whole answer is `{"name": …, "parameters": …}`, after `<|python_tag|>` perhaps (Llama 3.1 to 3.3)
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_NAMES_TOOLS = re.compile(r"{[{%][^}]*\btools\b")
_CUT_SHORT = re.compile(r'"name"\s*:\s*"(?P<name>[^"]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?P<rest>.*)', re.S)
_NAMED_ARGS = re.compile(r"\s*(?P<name>[\w.-]+)\s*\[ARGS\]\s*")
_DECODER = json.JSONDecoder()
_BETWEEN = " \t\r\n;,"


@dataclass(frozen=True, slots=True)
class Call:
    """A call that a model wrote. arguments: JSON, as text, which is how OpenAI's clients want it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """opens: what begins a call, in the text. closes: what ends it, "" where only the end of the text does.

    bare: an answer that begins with a brace is a call, too. key: what the arguments are called. listed: calls come in
    a list. special: `opens` is a special token, which must therefore stay in the text.
    """

    name: str
    opens: str
    closes: str
    key: str = "arguments"
    bare: bool = False
    listed: bool = False
    special: bool = False

    def forced(self, function: str | None) -> str:
        """What an answer begins with that is a call, of this function if one is named."""
        start = ("" if self.bare else self.opens) + ("\n" if self.closes else "") + ("[" if self.listed else "")
        return start + '{"name": "' + (f'{function}", "{self.key}": ' if function is not None else "")


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", listed=True, special=True)
LLAMA = ToolFormat("llama", "<|python_tag|>", "", key="parameters", bare=True, special=True)


def detect_format(template: str) -> ToolFormat | None:
    """None when the template knows no tools, or writes calls in a way that we cannot read."""
    if not _NAMES_TOOLS.search(template):
        return None
    if HERMES.opens in template:
        return HERMES
    if MISTRAL.opens in template:
        return MISTRAL
    if '"parameters"' in template and ("python_tag" in template or "ipython" in template):
        return LLAMA
    return None


def read_calls(text: str) -> list[Call] | None:
    """The calls in what stands between the marks of a format; None when it is not calls."""
    named = _NAMED_ARGS.match(text)
    if named:
        return _read_named(text)
    calls: list[Call] = []
    rest = text.strip()
    while rest:
        try:
            value, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        for one in value if isinstance(value, list) else [value]:
            call = _as_call(one)
            if call is None:
                return None
            calls.append(call)
        rest = rest[end:].lstrip(_BETWEEN)
    return calls or None


def ends_in_string(text: str) -> bool:
    """Whether the last JSON value of a text is cut within a string: a closing mark there is a part of that string."""
    rest = text.strip()
    while rest:
        try:
            _, end = _DECODER.raw_decode(rest)
        except json.JSONDecodeError as error:
            return error.msg.startswith("Unterminated string")
        except RecursionError:
            return False
        rest = rest[end:].lstrip(_BETWEEN)
    return False


def cut_short(text: str) -> Call | None:
    """A call whose JSON is not whole: the name, and the arguments as far as they got.

    For answers that had to be calls: their beginning was given, so it is known to be one.
    """
    found = _CUT_SHORT.search(text)
    return Call(found["name"], found["rest"].strip()) if found else None


def _read_named(text: str) -> list[Call] | None:
    calls = []
    while named := _NAMED_ARGS.match(text):
        try:
            arguments, end = _DECODER.raw_decode(text, named.end())
        except (ValueError, RecursionError):
            return None
        calls.append(Call(named["name"], _json(arguments)))
        text = text[end:].removeprefix(MISTRAL.opens)
    return calls if not text.strip() else None


def _as_call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return Call(value["name"], arguments if isinstance(arguments, str) else _json(arguments))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
