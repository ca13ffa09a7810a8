"""Conversations to prompts, by the jinja template that comes with a model.

A template is somebody else's program, so it runs in jinja's immutable sandbox, with the few helpers that the templates
of published models use (the conventions are those of Hugging Face chat templates).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treadle.errors import InvalidRequest

_EXPECTED = 'messages must be a non-empty list of {"role": …, "content": …}'


class ChatTemplate:
    """A compiled template. Raises InvalidRequest when the source is empty or is not a jinja template."""

    def __init__(self, source: str) -> None:
        if not source:
            raise InvalidRequest("this model has no chat template; give it a prompt instead of messages")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequest(f"this model's chat template is not valid: {error}") from error

    def render(self, messages: Sequence[Mapping[str, object]], **variables: object) -> str:
        """variables: seen by the template beside `messages`. Raises InvalidRequest, also when the template does."""
        checked = check_messages(messages)
        values: dict[str, object] = {"tools": None, "documents": None} | variables | {"messages": checked}
        try:
            return self._template.render(values)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the chat template refused these messages: {error}") from error
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            # Templates index and concatenate what they are given, so wrong shapes end in plain Python errors.
            raise InvalidRequest(f"the chat template cannot render these messages: {error!r}") from error


def check_messages(messages: object) -> list[dict[str, object]]:
    """The messages as plain dictionaries, lists of text parts joined; raises InvalidRequest that says what is wrong."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise InvalidRequest(f"{_EXPECTED}, not {messages!r:.80}")
    return [_check_message(index, message) for index, message in enumerate(messages)]


def _check_message(index: int, message: object) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise InvalidRequest(f"{_EXPECTED}; message {index} is {message!r:.80}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequest(f"{_EXPECTED}; the role of message {index} is {role!r:.80}, expected a string")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        return {**message, "content": "".join(_text_part(index, part) for part in content)}
    # An assistant that called a tool may have said nothing.
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return dict(message)
    raise InvalidRequest(f"{_EXPECTED}; the content of message {index} is {content!r:.80}, expected a string")


def _text_part(index: int, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        raise InvalidRequest(
            f'a content part of message {index} is {part!r:.80}, expected {{"type": "text", "text": …}}'
        )
    return text


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, this one does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
