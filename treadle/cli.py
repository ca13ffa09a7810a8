"""The command `treadle`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from treadle.errors import ConfigError, InvalidRequest, Overloaded, RequestFailed, TreadleError
from treadle.scheduler.options import ServiceOptions, service_options
from treadle.transport.endpoints import default_endpoint, read_keys, write_keys
from treadle.transport.messages import SamplingParams

from . import __version__
from .client import Client
from .frontend import Frontend
from .llm import LLM

DEFAULT_MODEL = "smollm2-135m"
_SAMPLING_FLAGS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; typed errors become one clear line on standard error and exit code 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return int(options.run(options))
    except TreadleError as error:
        print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has enough, `| head` for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="treadle", description="Continuous-batching inference, embedded or served.")
    parser.add_argument("--version", action="version", version=f"treadle {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model on a ZeroMQ endpoint")
    serve.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=f"name, directory or GGUF ({DEFAULT_MODEL})")
    serve.add_argument("--endpoint", default=default_endpoint(), help="ipc:///path or tcp://host:port (%(default)s)")
    serve.add_argument("--keys", type=Path, help="CURVE key file of `treadle keys`; tcp needs it")
    serve.add_argument("--parent", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    serve.add_argument("--options", default=None, help=argparse.SUPPRESS)
    _add_service_options(serve)
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="stream one answer to a prompt")
    generate.add_argument("prompt", help="the text, or - for standard input")
    _add_source(generate)
    _add_sampling(generate)
    generate.set_defaults(run=lambda options: asyncio.run(_generate(options)))

    chat = commands.add_parser("chat", help="talk to the model")
    chat.add_argument("--system", default=None, help="system message")
    _add_source(chat)
    _add_sampling(chat)
    chat.set_defaults(run=lambda options: asyncio.run(_chat(options)))

    for kind in ("stats", "health"):
        info = commands.add_parser(kind, help=f"print the {kind} of a server as JSON")
        _add_endpoint(info)
        info.set_defaults(run=lambda options, kind=kind: asyncio.run(_info(options, kind)))

    keys = commands.add_parser("keys", help="make a CURVE key file for tcp endpoints")
    keys.add_argument("file", type=Path)
    keys.set_defaults(run=_keys)
    return parser


def _serve(options: argparse.Namespace) -> int:
    from .serve import ServeSettings, run

    values = msgspec.json.decode(options.options) if options.options is not None else _service_values(options)
    settings = ServeSettings(
        model=options.model,
        endpoint=options.endpoint,
        options=service_options(**values),
        keys=read_keys(options.keys) if options.keys is not None else None,
        parent=tuple(options.parent) if options.parent is not None else None,
    )
    if settings.options.random_weights:
        logging.getLogger("treadle").warning("RANDOM WEIGHTS: the answers mean nothing; for benchmarks only")
    return run(settings, _announce)


def _announce(endpoint: str) -> None:
    print(f"treadle: ready on {endpoint}", flush=True)


async def _generate(options: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    async with _open(options) as llm:
        async for output in llm.generate(prompt, _sampling(options)):
            print(output.delta, end="", flush=True)
    print()
    return 0


async def _chat(options: argparse.Namespace) -> int:
    messages: list[dict[str, object]] = []
    if options.system is not None:
        messages.append({"role": "system", "content": options.system})
    async with _open(options) as llm:
        print("Type a message and Enter; end with Ctrl-D.", file=sys.stderr)
        while (line := await asyncio.to_thread(_read_line)) is not None:
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": await _answer(llm, messages, _sampling(options))})
            except (InvalidRequest, RequestFailed, Overloaded) as error:
                messages.pop()  # as if it had not been said: the conversation goes on
                print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
    return 0


async def _answer(llm: Frontend, messages: list[dict[str, object]], params: SamplingParams) -> str:
    text = ""
    async for output in llm.chat(messages, params):
        print(output.delta, end="", flush=True)
        text = output.text
    print()
    return text


async def _info(options: argparse.Namespace, kind: str) -> int:
    async with Client(options.endpoint, server_key=options.server_key) as client:
        answer = await (client.stats() if kind == "stats" else client.health())
    shown = {name: value for name, value in msgspec.structs.asdict(answer).items() if name != "id"}
    print(msgspec.json.format(msgspec.json.encode(shown)).decode())
    return 0


def _keys(options: argparse.Namespace) -> int:
    keys = write_keys(options.file)
    print(f"wrote {options.file}; the public key for clients (--server-key) is\n{keys.public}")
    return 0


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


# ── options ──


def _open(options: argparse.Namespace) -> Frontend:
    if options.endpoint is not None:
        return Client(options.endpoint, server_key=options.server_key)
    return LLM(options.model, **_service_values(options))


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", default=None, help="of a running server")
    parser.add_argument("--server-key", default=None, help="the server's public CURVE key, for tcp")


def _add_source(parser: argparse.ArgumentParser) -> None:
    _add_endpoint(parser)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="embedded, when no endpoint is given (%(default)s)")
    _add_service_options(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    types = {"max_tokens": int, "top_k": int, "seed": int}
    for name in _SAMPLING_FLAGS:
        kind = types.get(name, float)
        text = "default: to the context limit" if name == "max_tokens" else "as in SamplingParams"
        parser.add_argument(_flag(name), dest=f"sampling_{name}", type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument(
        "--stop", dest="sampling_stop", action="append", metavar="TEXT", help="ends the text; may be repeated"
    )


def _sampling(options: argparse.Namespace) -> SamplingParams:
    values = vars(options)
    given = {name: values[f"sampling_{name}"] for name in (*_SAMPLING_FLAGS, "stop")}
    return SamplingParams(**{"max_tokens": None, **{k: v for k, v in given.items() if v is not None}})


def _add_service_options(parser: argparse.ArgumentParser) -> None:
    """One flag per field of ServiceOptions; what is not given keeps its default."""
    group = parser.add_argument_group("service options (see ServiceOptions)")
    for field in msgspec.structs.fields(ServiceOptions):
        kind = _python_type(field.type)
        shape: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        if kind is not bool:
            shape = {"type": kind, "metavar": kind.__name__.upper()}
        destination, text = f"service_{field.name}", f"default {field.default!r}"
        group.add_argument(_flag(field.name), dest=destination, default=None, help=text, **shape)


def _service_values(options: argparse.Namespace) -> dict[str, Any]:
    values = vars(options)
    given = {field.name: values[f"service_{field.name}"] for field in msgspec.structs.fields(ServiceOptions)}
    return {name: value for name, value in given.items() if value is not None}


def _python_type(annotation: object) -> type[int] | type[float] | type[str] | type[bool]:
    for kind in (bool, int, float, str):
        if annotation is kind or annotation == kind | None:
            return kind
    raise ConfigError(f"an option of type {annotation} has no command-line form")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
