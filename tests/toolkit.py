"""For tests of tool calls: functions with narrow schemas, a model whose template knows tools, and its free choice."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import openai
import tokenizers

from treadle import LLM
from treadle.tokenizer import Tokenizer

TEMPLATE = (
    "{% if tools %}<tool_call> {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TIGHT: dict[str, Any] = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
TOWN = {
    **TIGHT,
    "properties": {"town": {"enum": ["Rome", "Oslo"]}},
    "required": ["town"],
    "additionalProperties": False,
}
HOUR = {**TIGHT, "properties": {"hour": {"type": "integer", "minimum": 0, "maximum": 23}}, "required": ["hour"]}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": TOWN}},
    {"type": "function", "function": {"name": "alarm", "parameters": HOUR, "strict": True}},
]
MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")


def is_valid(name: str, arguments: str) -> bool:
    value = json.loads(arguments)
    if name == "weather":
        return value["town"] in ("Rome", "Oslo")
    return name == "alarm" and set(value) == {"hour"} and 0 <= value["hour"] <= 23


def with_marks(tokenizer: Tokenizer, template: str = "") -> Tokenizer:
    """The same with a token for each mark, as models have that learnt to call."""
    info = tokenizer.to_info()
    backend = tokenizers.Tokenizer.from_str(info.tokenizer_json.decode())
    backend.add_tokens([*MARKS])
    changed = {"tokenizer_json": backend.to_str().encode(), "chat_template": template}
    return Tokenizer.from_info(msgspec.structs.replace(info, **changed))


class Templated(LLM):
    """A model whose chat template knows tools."""

    async def start(self) -> None:
        await super().start()
        assert self._tokenizer is not None
        short = TEMPLATE.replace("{{ tool | tojson }}", "{{ tool.function.name }}")  # the context is small
        self._tokenizer = with_marks(self._tokenizer, short)


async def what_a_free_choice_gives(model: LLM, api: openai.AsyncOpenAI, ask: Any) -> None:
    """Random weights with a liking for the mark: text and calls in turn, and every call is one that was promised."""
    strict: Any = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    loose: Any = [{**tool, "function": {**tool["function"], "strict": False}} for tool in TOOLS]
    [mark] = model.tokenize("<tool_call>", add_special_tokens=False)
    tight = {"banned_token_ids": model.tokenize(" \n\r\t", add_special_tokens=False)}  # a call ends in 80 tokens then
    liking: Any = {**ask, "tools": strict, "temperature": 1.0, "max_tokens": 130, "logit_bias": {mark: 5.0}}
    liking["extra_body"] = tight
    answers = await asyncio.gather(*(api.chat.completions.create(**liking, seed=seed) for seed in range(4)))
    messages = [answer.choices[0].message for answer in answers]
    found = [(c.function.name, c.function.arguments) for m in messages for c in m.tool_calls or ()]
    assert len(found) > 3 and all(is_valid(*one) for one in found), found
    assert any(m.content for m in messages), "it said something, too"
    pieces: dict[int, list[str]] = {}
    async for chunk in await api.chat.completions.create(**liking, stream=True, seed=0):
        for call in chunk.choices[0].delta.tool_calls or ():
            pieces.setdefault(call.index, []).append((call.function and call.function.arguments) or "")
    calls = messages[0].tool_calls or ()
    assert ["".join(pieces[place]) for place in sorted(pieces)] == [call.function.arguments for call in calls]
    flat: Any = [{"type": "function", **tool["function"]} for tool in strict]
    answer = await api.responses.create(
        model=ask["model"],
        input="a",
        tools=flat,
        temperature=1.0,
        max_output_tokens=90,
        extra_body={"seed": 1, "logit_bias": {str(mark): 100.0}, **tight},
    )
    made = [(item.name, item.arguments) for item in answer.output if item.type == "function_call"]
    assert made and all(is_valid(*one) for one in made), made
    ascii = model.tokenize("".join(map(chr, range(32, 127))) + "<|im_start|>", add_special_tokens=False)
    asked = [
        {**ask, "tools": tools, "seed": seed, "extra_body": {"allowed_token_ids": ascii}}
        for seed in range(3)
        for tools in (strict, loose)
    ]
    texts = [
        a.choices[0].message.content for a in await asyncio.gather(*(api.chat.completions.create(**a) for a in asked))
    ]
    assert texts[::2] == texts[1::2] and all(texts), "text is as free with a grammar as without"
