"""Tool calls: found in a text however it comes, and seen by OpenAI's client; and errors in the middle of a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import EngineFailed, Overloaded, ServerLost
from treadle.http import HttpServer, tool_stream
from treadle.http.tool_formats import HERMES, LLAMA, MISTRAL, Call, ToolFormat, detect_format, ends_in_string
from treadle.http.tool_stream import Found, ToolStream

from .httpkit import Scripted, async_client
from .toolkit import TEMPLATE, TOOLS, Templated, is_valid, what_a_free_choice_gives

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
ASK: Any = {"model": "scripted", "messages": [{"role": "user", "content": "Weather in Rome?"}], "tools": [WEATHER]}
ROME = Call("weather", '{"town": "Rome"}')
HERMES_ROME = '<tool_call>\n{"name": "weather", "arguments": {"town": "Rome"}}\n</tool_call>'


BROKEN = '<tool_call>{"name": "a</tool_call>'


def taken(format: ToolFormat, pieces: list[str], forced: str = "") -> tuple[str, list[Call]]:
    stream = ToolStream(format, forced)
    found = [stream.push(piece) for piece in pieces] + [stream.finish()]
    return "".join(one.text for one in found), [call for one in found for call in one.calls]


MARKED = Call("a", '{"x": "</tool_call>"}')
CASES = [
    (HERMES, HERMES_ROME, "", [ROME]),
    (HERMES, f"\n{HERMES_ROME}\n{HERMES_ROME}", "", [ROME, ROME]),
    (HERMES, f"Let me look.\n{HERMES_ROME}\n", "Let me look.", [ROME]),
    (HERMES, '<tool_call>[{"name": "a", "arguments": {}}]</tool_call>', "", [Call("a", "{}")]),
    (HERMES, "1 < 2 <tool> and <tool_cal", "1 < 2 <tool> and <tool_cal", []),
    (HERMES, "<tool_call>not json</tool_call> and on", "<tool_call>not json</tool_call> and on", []),
    (HERMES, '<tool_call>{"name": "a"', '<tool_call>{"name": "a"', []),
    (HERMES, '<tool_call>{"name": "a", "arguments": {}}', "", [Call("a", "{}")]),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"x": "</tool_call>"}}</tool_call>.', ".", [MARKED]),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"x": "</tool_call>"}}', "", [MARKED]),
    (HERMES, f"{BROKEN}\n{HERMES_ROME}", BROKEN, [ROME]),
    (HERMES, f"{BROKEN} and on", f"{BROKEN} and on", []),
    (HERMES, "  plain ", "  plain ", []),
    (HERMES, "a <tool_call>b</tool_call> ", "a <tool_call>b</tool_call> ", []),
    (HERMES, f"{HERMES_ROME}\n Done. ", "\n Done.", [ROME]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Rome"}}]', "", [ROME]),
    (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"town": "Rome"}[TOOL_CALLS]a[ARGS]{}', "", [ROME, Call("a", "{}")]),
    (MISTRAL, "No tools [here]", "No tools [here]", []),
    (LLAMA, '{"name": "weather", "parameters": {"town": "Rome"}}', "", [ROME]),
    (LLAMA, '<|python_tag|>{"name": "a"}; {"name": "b"}', "", [Call("a", "{}"), Call("b", "{}")]),
    (LLAMA, '{"not": "a call"}', '{"not": "a call"}', []),
    (LLAMA, 'As JSON: {"name": "a", "parameters": {}}', 'As JSON: {"name": "a", "parameters": {}}', []),
]  # fmt: skip


@pytest.mark.parametrize(("format", "text", "plain", "calls"), CASES)
@settings(deadline=None)
@given(st.data())
def test_calls_are_found_however_the_text_is_cut(
    format: ToolFormat, text: str, plain: str, calls: list[Call], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert taken(format, pieces) == (plain, calls)


@settings(deadline=None)
@given(
    st.text(alphabet='<tol_ca>/{}[]" \n:nme', max_size=60), st.integers(1, 7), st.sampled_from([HERMES, LLAMA, MISTRAL])
)
def test_text_that_is_no_call_comes_through_whole(text: str, size: int, format: ToolFormat) -> None:
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    plain, calls = taken(format, pieces)
    assert plain == text or calls


def test_each_closing_mark_in_a_string_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    def judge(text: str) -> bool:
        judged.append(len(text))
        return ends_in_string(text)

    monkeypatch.setattr(tool_stream, "ends_in_string", judge)
    marks = "</tool_call>" * 99
    text = f'<tool_call>{{"name": "a", "arguments": {{"x": "{marks}{"and on " * 99}"}}}}</tool_call>.'
    assert taken(HERMES, list(text)) == (".", [Call("a", f'{{"x": "{marks}{"and on " * 99}"}}')])
    assert len(judged) == 100 and judged == sorted(judged)


@pytest.mark.parametrize("size", [1, 1_000, 100_000])
def test_text_after_a_broken_call_is_not_held_for_ever(size: int) -> None:
    stream = ToolStream(HERMES)
    text = BROKEN + "x" * 16_384
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert "".join(stream.push(piece).text for piece in pieces) == text
    assert stream.push(f"{HERMES_ROME} on") == Found(" on", [ROME])


@pytest.mark.parametrize("format", [HERMES, MISTRAL, LLAMA])
def test_a_forced_call_is_read_with_what_was_given(format: ToolFormat) -> None:
    end = format.closes or ("]" if format.listed else "")
    named = format.forced("weather")
    assert taken(format, ['{"town": ', '"Rome"}}', end], named) == ("", [ROME])
    assert taken(format, [f'weather", "{format.key}": {{"town": "Rome"}}}}{end}'], format.forced(None)) == ("", [ROME])
    assert taken(format, ['{"town": "Ro'], named) == ("", [Call("weather", '{"town": "Ro')]), "as far as it got"


def test_formats_are_known_by_their_templates() -> None:
    assert detect_format(TEMPLATE) is HERMES
    assert detect_format("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]") is MISTRAL
    assert detect_format('{% if tools is not none %}Environment: ipython {"name": x, "parameters": y}') is LLAMA
    assert detect_format("{{ messages }} tools <tool_call>") is None, "it knows no tools"
    assert detect_format("{% if tools %}call them as you like{% endif %}") is None


@pytest_asyncio.fixture
async def model(tiny: Path) -> AsyncIterator[Scripted]:
    async with Scripted(tiny, TEMPLATE) as opened:
        yield opened


@pytest_asyncio.fixture
async def api(model: Scripted) -> AsyncIterator[openai.AsyncOpenAI]:
    async with HttpServer(model, "127.0.0.1:0") as server, async_client(server.url) as made:
        yield made


@pytest.mark.asyncio
async def test_openai_sees_the_call(model: Scripted, api: openai.AsyncOpenAI) -> None:
    model.script = f"I look. {HERMES_ROME}"
    answer = (await api.chat.completions.create(**ASK)).choices[0]
    assert answer.finish_reason == "tool_calls" and answer.message.content == "I look."
    assert answer.message.tool_calls is not None
    [call] = answer.message.tool_calls
    assert call.type == "function" and call.id and json.loads(call.function.arguments) == {"town": "Rome"}
    assert '"description": "Of a town"' in model.prompts[0], "the template was given the tools"

    text, name, arguments, reasons = "", "", "", []
    async for chunk in await api.chat.completions.create(stream=True, **ASK):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for piece in choice.delta.tool_calls or []:
                assert piece.index == 0
                name += (piece.function and piece.function.name) or ""
                arguments += (piece.function and piece.function.arguments) or ""
    assert (text, name, json.loads(arguments), reasons) == ("I look.", "weather", {"town": "Rome"}, ["tool_calls"])
    async with api.chat.completions.stream(**ASK) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None

    messages = [
        *ASK["messages"],
        answer.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "Sun"},
    ]
    model.script = "Sunny."
    after = await api.chat.completions.create(**{**ASK, "messages": messages})
    assert after.choices[0].message.content == "Sunny." and after.choices[0].finish_reason == "stop"
    assert '<tool_call>{"name": "weather", "arguments": {"town": "Rome"}}</tool_call>' in model.prompts[-1]
    assert "<|im_start|>tool\nSun<|im_end|>" in model.prompts[-1]


@pytest.mark.asyncio
async def test_tool_choice(model: Scripted, api: openai.AsyncOpenAI) -> None:
    model.script = '{"town": "Rome"}}\n</tool_call>'
    named = {"type": "function", "function": {"name": "weather"}}
    answer = (await api.chat.completions.create(**ASK, tool_choice=named)).choices[0]
    assert model.prompts[-1].endswith('assistant\n<tool_call>\n{"name": "weather", "arguments": ')
    assert answer.message.tool_calls is not None and answer.message.content is None
    assert answer.message.tool_calls[0].function.name == "weather" and answer.finish_reason == "tool_calls"
    model.script = 'weather", "arguments": {"town": "Rome"}}</tool_call>'
    answer = (await api.chat.completions.create(**ASK, tool_choice="required")).choices[0]
    assert answer.message.tool_calls is not None and model.prompts[-1].endswith('{"name": "')
    model.script = HERMES_ROME
    answer = (await api.chat.completions.create(**ASK, tool_choice="none")).choices[0]
    assert answer.message.tool_calls is None and answer.message.content == HERMES_ROME
    assert "Of a town" not in model.prompts[-1]
    with pytest.raises(openai.BadRequestError, match="not in tools"):
        await api.chat.completions.create(**ASK, tool_choice={"type": "function", "function": {"name": "other"}})


CHAT: Any = {"model": "m", "messages": ASK["messages"], "temperature": 2.0, "max_tokens": 60, "tools": TOOLS}


@pytest.mark.asyncio
async def test_a_model_without_sense_makes_calls_that_are_valid(tiny: Path) -> None:
    """Random weights at a high temperature: nothing but the grammar keeps its arguments in form."""
    async with (
        Templated(str(tiny), num_blocks=256, max_num_seqs=8, dtype="float32") as model,
        HttpServer(model, "127.0.0.1:0") as server,
        async_client(server.url) as api,
    ):
        model_name = (await api.models.list()).data[0].id
        ask = {**CHAT, "model": model_name}
        named: Any = {"type": "function", "function": {"name": "alarm"}}
        for choice in ("required", named):
            answers = await asyncio.gather(
                *(api.chat.completions.create(**ask, tool_choice=choice, seed=seed) for seed in range(6))
            )
            found = [(c.function.name, c.function.arguments) for a in answers for c in a.choices[0].message.tool_calls]
            assert len(found) == 6 and all(is_valid(*one) for one in found), found
            assert {a.choices[0].finish_reason for a in answers} == {"tool_calls"}
            assert len({*found}) > 1, "they are drawn"
        assert {name for name, _ in found} == {"alarm"}
        pieces = [
            call.function
            async for chunk in await api.chat.completions.create(**ask, tool_choice="required", stream=True, seed=3)
            for part in chunk.choices
            for call in part.delta.tool_calls or []
        ]
        assert is_valid("".join(p.name or "" for p in pieces), "".join(p.arguments or "" for p in pieces))
        flat: Any = [{"type": "function", "strict": False, **tool["function"]} for tool in TOOLS]
        answer = await api.responses.create(
            model=model_name, input="a", tools=flat, tool_choice="required", temperature=2.0, max_output_tokens=60
        )
        [call] = answer.output
        assert call.type == "function_call" and is_valid(call.name, call.arguments)
        await what_a_free_choice_gives(model, api, ask)
        await what_cannot_be_held(api, ask)


def _named(name: str) -> Any:
    return {"type": "function", "function": {"name": name}}


async def what_cannot_be_held(api: openai.AsyncOpenAI, ask: Any) -> None:
    """A schema that llguidance does not know: of the call its name and an object are left, unless it is strict."""
    odd = {"name": "odd", "parameters": {"type": "object", "unheardOf": 1, "not": {"type": "object"}}}
    for strict in (False, True):
        tools: Any = [{"type": "function", "function": {**odd, "strict": strict}}]
        short = {**ask, "tools": tools, "max_tokens": 5, "seed": 1}  # drawn anew, one in fifty ends by itself
        free = api.chat.completions.create(**short)
        asking = api.chat.completions.create(**short, tool_choice="required")
        if strict:
            for one in (asking, free):
                with pytest.raises(openai.BadRequestError, match="tools: "):
                    await one
        else:
            assert [(await one).choices[0].finish_reason for one in (asking, free)] == ["length"] * 2
    other = {"name": "other", "parameters": {"type": "object"}}
    beside: Any = {**ask, "tools": [{"type": "function", "function": function} for function in (other, odd)]}
    for choice, names in (("required", {"other", "odd"}), (_named("odd"), {"odd"})):
        answers = await asyncio.gather(
            *(api.chat.completions.create(**beside, tool_choice=choice, seed=seed) for seed in range(8))
        )
        calls = [
            (answer.choices[0], call.function) for answer in answers for call in answer.choices[0].message.tool_calls
        ]
        assert {call.name for _, call in calls} <= names
        whole = [json.loads(call.arguments) for choice, call in calls if choice.finish_reason == "tool_calls"]
        assert whole and all(isinstance(arguments, dict) for arguments in whole)
    with pytest.raises(openai.BadRequestError, match="structured_outputs together with tools"):
        await api.chat.completions.create(**ask, extra_body={"structured_outputs": {"choice": ["a"]}})
    cut = {**ask, "tool_choice": _named("alarm"), "stop": ["}"]}
    [end] = (await api.chat.completions.create(**cut)).choices
    assert end.finish_reason == "stop" and end.model_extra == {"stop_reason": "}"}, "a stop string cut it"
    pieces = [chunk.choices[0] async for chunk in await api.chat.completions.create(**cut, stream=True)]
    assert pieces[-1].finish_reason == "stop"
    answer = await api.chat.completions.create(**{**ask, "max_tokens": 3}, tool_choice="required")
    assert answer.choices[0].finish_reason == "length", "cut short"


@pytest.mark.asyncio
async def test_calls_in_responses(model: Scripted, api: openai.AsyncOpenAI) -> None:
    model.script = f"I look. {HERMES_ROME}"
    tool: Any = {"type": "function", **WEATHER["function"], "strict": False}
    ask: Any = {"model": "scripted", "input": "Weather in Rome?", "tools": [tool]}
    whole = await api.responses.create(**ask)
    assert [item.type for item in whole.output] == ["message", "function_call"] and whole.status == "completed"
    call = whole.output[1]
    assert call.type == "function_call" and json.loads(call.arguments) == {"town": "Rome"}
    async with api.responses.stream(**ask) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds and kinds[-1] == "response.completed"
    assert [item.type for item in final.output] == ["message", "function_call"]
    model.script = "Sunny."
    items = [
        {"role": "user", "content": "Weather in Rome?"},
        *(item.model_dump(exclude_none=True) for item in whole.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "Sun"},
    ]
    after = await api.responses.create(**{**ask, "input": items})
    assert after.output_text == "Sunny." and "<|im_start|>tool\nSun" in model.prompts[-1]
    assert '<tool_call>{"name": "weather", "arguments": {"town": "Rome"}}</tool_call>' in model.prompts[-1]


@pytest.mark.asyncio
async def test_the_first_event_decides_the_status(model: Scripted, api: openai.AsyncOpenAI) -> None:
    ask: Any = {"model": "scripted", "messages": ASK["messages"]}
    for stream in (False, True):
        model.error, model.error_after = Overloaded("full", 2.4), 0
        with pytest.raises(openai.RateLimitError) as refused:
            await api.chat.completions.create(stream=stream, **ask)
        assert refused.value.response.headers["retry-after"] == "3" and refused.value.code == "overloaded"
        model.error = ServerLost("gone")
        with pytest.raises(openai.InternalServerError) as lost:
            await api.completions.create(model="scripted", prompt="a", stream=stream)
        assert lost.value.status_code == 503
        model.error = EngineFailed("twice")
        with pytest.raises(openai.InternalServerError) as failed:
            await api.responses.create(model="scripted", input="a", stream=stream)
        assert failed.value.status_code == 500


@pytest.mark.asyncio
async def test_an_error_after_the_first_event_is_told_in_the_stream(model: Scripted, api: openai.AsyncOpenAI) -> None:
    model.script, model.error, model.error_after = "0123456789", EngineFailed("it died"), 6
    text = ""
    stream = await api.chat.completions.create(model="scripted", messages=ASK["messages"], stream=True)
    with pytest.raises(openai.APIError, match="it died"):
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text == "012345"
    events = [event async for event in await api.responses.create(model="scripted", input="a", stream=True)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None and events[-1].response.error.message == "it died"
