"""`treadle generate` and `treadle chat`: a model, asked in a terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import AsyncIterable

from treadle.errors import InvalidRequest, Overloaded, RequestFailed
from treadle.transport.messages import SamplingParams
from treadle.transport.params import check_params

from .flags import add_sampling_options, add_service_options, sampling_params
from .frontend import Frontend
from .lines import Lines
from .outputs import RequestOutput
from .reaching import Commands, add_command, add_source, open_frontend

_EMBEDDED = "of the engines that run for this command, without --endpoint"
_SOURCE = "from a running server with --endpoint, else from engines that run for this one command"


def add_generate_command(commands: Commands) -> None:
    generate = add_command(commands, "generate", "stream one answer to a prompt", _SOURCE)
    generate.add_argument("prompt", help="the text, or - for standard input")
    add_source(generate)
    add_sampling_options(generate)
    add_service_options(generate, _EMBEDDED)
    generate.set_defaults(run=_generate)


def add_chat_command(commands: Commands) -> None:
    chat = add_command(commands, "chat", "talk to the model, a line at a time", _SOURCE)
    chat.add_argument("--system", metavar="TEXT", help="system message: how the model should behave")
    add_source(chat)
    add_sampling_options(chat)
    add_service_options(chat, _EMBEDDED)
    chat.set_defaults(run=_chat)


def _generate(options: argparse.Namespace) -> int:
    prompt = _standard_input() if options.prompt == "-" else _text(options.prompt, "the prompt")
    if not prompt:
        raise InvalidRequest("the prompt is empty: give some text")
    return asyncio.run(_stream(open_frontend(options), prompt, _params(options), options.tenant))


async def _stream(frontend: Frontend, prompt: str, params: SamplingParams, tenant: str) -> int:
    async with frontend as llm:
        await show(llm.generate(prompt, params, tenant=tenant))
    return 0


def _chat(options: argparse.Namespace) -> int:
    system = None if options.system is None else _text(options.system, "--system")
    return asyncio.run(_converse(open_frontend(options), system, _params(options), options.tenant))


async def _converse(frontend: Frontend, system: str | None, params: SamplingParams, tenant: str) -> int:
    messages: list[dict[str, object]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    async with frontend as llm:
        if sys.stdin.isatty():
            print("Type a message and Enter; end with Ctrl-D.", file=sys.stderr)
        async for line in Lines(sys.stdin.fileno(), "> " if sys.stdin.isatty() else ""):
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": await show(llm.chat(messages, params, tenant=tenant))})
            except (InvalidRequest, RequestFailed, Overloaded) as error:
                messages.pop()  # as if it had not been said: the conversation goes on
                print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
    return 0


async def show(outputs: AsyncIterable[RequestOutput]) -> str:
    """Prints a stream as it comes, and returns its text. What is said of its failure begins a line of its own."""
    text = ""
    try:
        async for output in outputs:
            print(output.delta, end="", flush=True)
            text = output.text
    except BaseException:
        print(end="\n" if text else "", flush=True)
        raise
    print()
    return text


def _params(options: argparse.Namespace) -> SamplingParams:
    params = sampling_params(options)
    check_params(params)  # before a model is loaded
    return params


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error


def _text(argument: str, what: str) -> str:
    """Python keeps the bytes of an argument that are not text as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{what} is not UTF-8, at character {error.start}") from error
    return argument
