"""What the commands of `treadle` do."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from treadle.errors import ConfigError, InvalidRequest, Overloaded, RequestFailed, TreadleError
from treadle.scheduler.options import service_options
from treadle.transport.endpoints import default_endpoint, read_keys, write_keys
from treadle.transport.messages import SamplingParams
from treadle.transport.params import check_params

from . import __version__
from .client import Client
from .flags import add_sampling_options, add_service_options, flag, sampling_params, service_values
from .frontend import Frontend
from .lines import Lines
from .llm import LLM
from .progress import show_on

DEFAULT_MODEL = "smollm2-135m"
_CONNECT_SECONDS = 10.0


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; typed errors become one clear line on standard error and exit code 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    show_on(sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    try:
        return int(options.run(options))
    except TreadleError as error:
        print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="treadle", description="Continuous-batching inference, embedded or served.")
    parser.add_argument("--version", action="version", version=f"treadle {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = _command(commands, "serve", "serve a model on a ZeroMQ endpoint", "until Ctrl-C or SIGTERM")
    serve.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=_MODEL + " (default %(default)s)")
    serve.add_argument("--endpoint", default=default_endpoint(), help=_ENDPOINT + " (default %(default)s)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="key file that `treadle keys` made; tcp needs it")
    serve.add_argument("--parent", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    serve.add_argument("--options", default=None, help=argparse.SUPPRESS)
    add_service_options(serve)
    serve.set_defaults(run=_serve)

    generate = _command(commands, "generate", "stream one answer to a prompt", _SOURCE)
    generate.add_argument("prompt", help="the text, or - for standard input")
    _add_source(generate)
    add_sampling_options(generate)
    add_service_options(generate, _EMBEDDED)
    generate.set_defaults(run=_generate)

    chat = _command(commands, "chat", "talk to the model, a line at a time", _SOURCE)
    chat.add_argument("--system", metavar="TEXT", help="system message: how the model should behave")
    _add_source(chat)
    add_sampling_options(chat)
    add_service_options(chat, _EMBEDDED)
    chat.set_defaults(run=_chat)

    for kind in ("stats", "health"):
        info = _command(commands, kind, f"print the {kind} of a server as JSON")
        info.add_argument("--endpoint", default=default_endpoint(), help="of the server (default %(default)s)")
        _add_connection(info)
        info.set_defaults(run=lambda options, kind=kind: asyncio.run(_info(options, kind)))

    keys = _command(commands, "keys", "make a CURVE key file for tcp endpoints", "and print the public key for clients")
    keys.add_argument("file", type=Path, help="to make, readable only by you; an existing file is left alone")
    keys.set_defaults(run=_keys)
    return parser


_MODEL = "built-in name, directory with config.json and safetensors, GGUF file, or org/name on the hub"
_ENDPOINT = "ipc:///absolute/path or tcp://host:port"
_EMBEDDED = "of the engines that run for this command, without --endpoint"
_SOURCE = "from a running server with --endpoint, else from engines that run for this one command"


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, does: str, more: str = ""
) -> argparse.ArgumentParser:
    # abbreviations off: a script that used one would break with the next option that begins alike
    description = f"{does[0].upper()}{does[1:]}{', ' * bool(more)}{more}."
    return commands.add_parser(name, help=does, description=description, allow_abbrev=False)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", help=f"of a running server: {_ENDPOINT}, or `default`")
    _add_connection(parser)
    parser.add_argument("--model", help=f"without --endpoint: {_MODEL} (default {DEFAULT_MODEL})")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server-key", metavar="KEY", help="the server's public CURVE key, for tcp")
    parser.add_argument(
        "--connect-timeout",
        type=float,
        metavar="SECONDS",
        help=f"for the server's answer (default {_CONNECT_SECONDS:g})",
    )


# ── what they do ──


def _serve(options: argparse.Namespace) -> int:
    from .serve import ServeSettings, run

    values = msgspec.json.decode(options.options) if options.options is not None else service_values(options)
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


def _generate(options: argparse.Namespace) -> int:
    prompt = _standard_input() if options.prompt == "-" else _text(options.prompt, "the prompt")
    if not prompt:
        raise InvalidRequest("the prompt is empty: give some text")
    return asyncio.run(_stream(_open(options), prompt, _params(options)))


async def _stream(frontend: Frontend, prompt: str, params: SamplingParams) -> int:
    async with frontend as llm:
        async for output in llm.generate(prompt, params):
            print(output.delta, end="", flush=True)
    print()
    return 0


def _chat(options: argparse.Namespace) -> int:
    system = None if options.system is None else _text(options.system, "--system")
    return asyncio.run(_converse(_open(options), system, _params(options)))


async def _converse(frontend: Frontend, system: str | None, params: SamplingParams) -> int:
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
                messages.append({"role": "assistant", "content": await _answer(llm, messages, params)})
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
    async with _client(options) as client:
        answer = await (client.stats() if kind == "stats" else client.health())
    shown = {name: value for name, value in msgspec.structs.asdict(answer).items() if name != "id"}
    print(msgspec.json.format(msgspec.json.encode(shown)).decode())
    return 0


def _keys(options: argparse.Namespace) -> int:
    keys = write_keys(options.file)
    print(f"wrote {options.file}; the public key for clients (--server-key) is\n{keys.public}")
    return 0


# ── options ──


def _open(options: argparse.Namespace) -> Frontend:
    values = service_values(options)
    if options.endpoint is None:
        for name in ("server_key", "connect_timeout"):
            if vars(options)[name] is not None:
                raise ConfigError(f"{flag(name)} is of a server: give its --endpoint, too")
        return LLM(DEFAULT_MODEL if options.model is None else options.model, **values)
    given = ([] if options.model is None else ["model"]) + list(values)
    if given:
        names = ", ".join(flag(name) for name in given)
        raise ConfigError(
            f"{names}: the server at --endpoint has its own; give it to `treadle serve`, or no --endpoint"
        )
    return _client(options)


def _client(options: argparse.Namespace) -> Client:
    seconds = _CONNECT_SECONDS if options.connect_timeout is None else options.connect_timeout
    endpoint = default_endpoint() if options.endpoint == "default" else options.endpoint
    return Client(endpoint, server_key=options.server_key, connect_timeout=seconds)


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
