"""Chat templates: the conventions of published ones, in a sandbox, with errors that say what is allowed."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from treadle.chat_template import ChatTemplate
from treadle.errors import InvalidRequest

USER = [{"role": "user", "content": "hi"}]


def _render(source: str, messages: Any = USER, **variables: object) -> str:
    return ChatTemplate(source).render(messages, **variables)


def test_blocks_are_trimmed_as_templates_expect() -> None:
    source = "{% for message in messages %}\n    {% if true %}\n{{ message.content }}\n    {% endif %}\n{% endfor %}\n"
    assert _render(source) == "hi\n"


def test_helpers() -> None:
    assert _render("{{ messages | tojson }}", [{"role": "a", "content": "<é>"}]) == '[{"role": "a", "content": "<é>"}]'
    assert _render("{{ tools | tojson(indent=2) }}", tools=[1]) == "[\n  1\n]"
    assert _render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    assert _render("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}") == "1"
    assert _render("{% generation %}a{{ messages[0].content }}{% endgeneration %}b") == "ahib"
    assert _render("{% if tools %}t{% endif %}{{ add_generation_prompt }}", add_generation_prompt=True) == "True"


def test_text_parts_are_joined_and_fields_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert (
        _render("{{ messages[0].content }}{{ messages[0].name }}", [{"role": "u", "content": parts, "name": "n"}])
        == "abn"
    )
    call = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert _render("{{ messages[0].tool_calls[0].name }}", call) == "f"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"non-empty list of \{\"role\""),
        ("hi", "not 'hi'"),
        (None, "not None"),
        ({"role": "user", "content": "x"}, "non-empty list"),
        (["hi"], "message 0 is 'hi'"),
        ([*USER, {"content": "x"}], "the role of message 1 is None"),
        ([{"role": 3, "content": "x"}], "the role of message 0 is 3"),
        ([{"role": "user"}], "the content of message 0 is None"),
        ([{"role": "user", "content": 3}], "the content of message 0 is 3"),
        ([{"role": "user", "content": b"x"}], "the content of message 0"),
        ([{"role": "user", "content": [{"type": "image"}]}], "expected .*text"),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _render("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no chat template"),
        ("{% if %}", "not valid"),
        ("{{ raise_exception('roles must alternate') }}", "refused these messages: roles must alternate"),
        ("{{ messages[0].content + 3 }}", "cannot render"),
        ("{{ none.x.y }}", "refused"),
        ("{% for x in range(10**9) %}{% endfor %}", "cannot render|refused"),
        ("{{ ''.__class__.__mro__ }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ messages.__init__.__globals__ }}", "refused"),
        ("{% include '/etc/passwd' %}", "refused|cannot render"),
    ],
)
def test_templates_that_fail_or_misbehave(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        _render(source)
