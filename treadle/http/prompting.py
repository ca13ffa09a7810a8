"""Conversations and tools to the tokens of a prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import msgspec

from treadle.errors import InvalidRequest, PromptTooLong
from treadle.transport.messages import Guided

from .chat_bodies import ChatMessage, FunctionTool, NamedTool, ResponseFormat, Tool
from .errors import bad_request
from .gateway import off_loop
from .generation import needs_tokenizer
from .link import Served
from .sampling import SamplingFields
from .tool_formats import ToolFormat
from .tool_grammars import ANY_OBJECT, rest_of_call
from .tool_grammars_auto import text_or_calls

ToolChoice = Literal["none", "auto", "required"] | NamedTool | None
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How calls are to be found in an answer. forced: what the answer begins with, put at the end of the prompt.

    rest: what the answer must be, or go on with if it is forced; None where it may be anything. looser: the same with
    any object for arguments. strict: whether `rest` was promised.
    """

    format: ToolFormat
    forced: str = ""
    rest: Guided | None = None
    looser: Guided | None = None
    strict: bool = False

    def loosened(self) -> ToolPlan:
        """The same with less of a grammar, or none."""
        return replace(self, rest=self.looser, looser=None)


def plan_tools(served: Served, tools: Sequence[Tool] | None, choice: ToolChoice) -> ToolPlan | None:
    """None when no calls are to be looked for. Raises ApiError for what the model's template cannot do."""
    names = [tool.function.name for tool in tools or ()]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad_request(f"tool_choice names {choice.function.name!r:.200}, which is not in tools", "tool_choice")
    if choice == "required" and not names:
        raise bad_request("tool_choice is required and there are no tools", "tool_choice")
    if not names or choice == "none":
        return None
    if served.tools is None:
        raise bad_request("this model's chat template defines no tools, or writes calls in an unknown form", "tools")
    if choice is None or choice == "auto":
        return _free_plan(served, served.tools, [tool.function for tool in tools or ()])
    name = choice.function.name if isinstance(choice, NamedTool) else None
    functions = [tool.function for tool in tools or () if name is None or tool.function.name == name]
    rest = rest_of_call(served.tools, functions, named=name is not None)
    plain = [FunctionTool(function.name, parameters=ANY_OBJECT) for function in functions]
    looser = rest_of_call(served.tools, plain, named=name is not None)
    return ToolPlan(served.tools, served.tools.forced(name), rest, looser, any(f.strict for f in functions))


def _free_plan(served: Served, format: ToolFormat, functions: Sequence[FunctionTool]) -> ToolPlan:
    """The model chooses whether to call. A grammar costs masks, also for text: only who asks for `strict` gets one."""
    if not any(function.strict for function in functions):
        return ToolPlan(format)
    added = needs_tokenizer(served, "a strict function").added_tokens
    return ToolPlan(format, rest=text_or_calls(format, functions, added), strict=True)


async def held_if_possible(plan: ToolPlan | None, answer: Callable[[ToolPlan | None], Awaitable[T]]) -> T:
    """An answer by this plan; by less of it where the service cannot hold to all (a schema is beyond llguidance) or to
    any (it has none), unless a function is strict. Raises what `answer` raises."""
    try:
        return await answer(plan)
    except InvalidRequest as error:
        if plan is None or plan.rest is None or plan.strict or isinstance(error, PromptTooLong):
            raise
    return await held_if_possible(plan.loosened(), answer)


def guided_by(
    format: ResponseFormat | None, plan: ToolPlan | None, own: Guided | None, param: str = "response_format"
) -> Guided | None:
    """What the answer must be; None is any text. own: `structured_outputs`. param: the field's name. Raises ApiError.

    A schema is always held to, whether `strict` or not.
    """
    if plan is not None and own is not None:
        raise bad_request("structured_outputs together with tools: give one of them", "structured_outputs")
    if format is None or format.type == "text":
        return plan.rest if plan is not None else None
    if plan is not None:
        raise bad_request(f"{param} {format.type} together with tools: give one of them", param)
    if format.type == "json_object":
        return Guided(json_object=True)
    schema = (format.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise bad_request(f"{param} json_schema needs a schema, which is an object", param)
    return Guided(json=schema)


def guided_name(fields: SamplingFields, plan: ToolPlan | None, param: str = "response_format") -> str:
    """The field of the body that says what the answer must be. param: see `guided_by`."""
    if fields.structured_outputs is not None:
        return "structured_outputs"
    return param if plan is None else "tools"


async def chat_prompt(
    served: Served,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] | None,
    plan: ToolPlan | None,
    variables: dict[str, Any],
) -> list[int]:
    """The tokens of a conversation. Raises InvalidRequest when the template refuses it."""
    tokenizer = needs_tokenizer(served, "chat")
    plain = [_plain(message, tokenizer.chat_template) for message in messages]
    if plan is not None:
        variables = {**variables, "tools": msgspec.to_builtins(tools)}
    text = tokenizer.apply_chat_template(plain, **_allowed(variables))
    if plan is not None:
        text += plan.forced
    return await off_loop(lambda long: tokenizer.encode(long, add_special_tokens=False), text)


def _allowed(variables: dict[str, Any]) -> dict[str, Any]:
    if "messages" in variables:
        raise bad_request("chat_template_kwargs must not hold messages: they are a field of their own")
    return variables


def role_for(role: str, template: str) -> str:
    """OpenAI's newer name for a system message, and its older one for a tool's, as those that templates know."""
    if role == "developer" and not re.search("""['"]developer['"]""", template):
        return "system"
    return "tool" if role == "function" else role


def _plain(message: ChatMessage, template: str) -> dict[str, object]:
    """As templates expect it: arguments of calls as objects, roles by the names that they know."""
    plain: dict[str, object] = msgspec.to_builtins(message)
    if message.tool_calls:
        plain.setdefault("content", "")  # templates concatenate it
    plain["role"] = role_for(message.role, template)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(text: str) -> object:
    """An object where the text is one; templates write it out as JSON again."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
