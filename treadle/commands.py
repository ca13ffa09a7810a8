"""What the commands of `treadle` do."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from treadle.engine import lifeline
from treadle.errors import ConfigError, InvalidRequest, Overloaded, RequestFailed, ServiceError, TreadleError
from treadle.scheduler.client_limits import ClientLimits
from treadle.scheduler.options import service_options
from treadle.transport.allow_list import read_allow_list
from treadle.transport.endpoints import default_endpoint, read_keys, write_keys
from treadle.transport.messages import Health, SamplingParams
from treadle.transport.params import check_params

from . import __version__
from .bench.command import add_bench_options
from .client import Client
from .exit_codes import HEALTH, exit_codes
from .flags import add_sampling_options, add_service_options, flag, sampling_params, service_values
from .frontend import Frontend
from .http.extra import check_extra
from .http.flags import add_gateway_options, gateway_settings
from .http.settings import GatewaySettings
from .lines import Lines
from .llm import LLM
from .progress import show_on
from .replaying import add_replay_options
from .simulating import add_simulate_options
from .top.extra import check_extra as check_top_extra
from .tracing import RECORDS, add_trace_command

DEFAULT_MODEL = "smollm2-135m"
_CONNECT_SECONDS = 10.0
_DRAIN_LOOK_SECONDS = 0.1


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; typed errors become one clear line on standard error and exit code 2."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:  # said of the command, not of `treadle`, whose usage would not help
        options.parser.exit(2, f"{options.parser.prog}: unknown: {' '.join(unknown)}; --help lists what there is\n")
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

    serve = _command(commands, "serve", "serve a model on a ZeroMQ endpoint", _UNTIL)
    serve.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=_MODEL + " (default %(default)s)")
    serve.add_argument("--endpoint", default=default_endpoint(), help=_ENDPOINT + " (default %(default)s)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="key file that `treadle keys` made; tcp needs it")
    serve.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="to finish what runs after the first SIGINT or SIGTERM; a second one ends at once (default %(default)g)",
    )
    serve.add_argument(
        "--allow", type=Path, metavar="FILE", help="tcp: only clients whose public key stands in it, one a line"
    )
    serve.add_argument(
        "--client-requests",
        type=int,
        default=4096,
        metavar="INT",
        help="open requests of one client (default %(default)s)",
    )
    serve.add_argument(
        "--client-rate",
        type=float,
        default=10_000.0,
        metavar="FLOAT",
        help="messages a second of one client (default %(default)g)",
    )
    serve.add_argument("--parent", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    serve.add_argument("--options", default=None, help=argparse.SUPPRESS)
    add_gateway_options(serve)
    add_service_options(serve)
    serve.set_defaults(run=_serve)

    gateway = _command(commands, "gateway", "serve OpenAI's HTTP API in front of a running server", _UNTIL)
    gateway.add_argument("endpoint", help=f"of the server: {_ENDPOINT}, or `default`")
    gateway.add_argument("--server-key", metavar="KEY", help="the server's public CURVE key, for tcp")
    gateway.add_argument("--child", type=int, nargs=3, default=None, help=argparse.SUPPRESS)
    gateway.add_argument("--options", default=None, help=argparse.SUPPRESS)
    add_gateway_options(gateway)
    gateway.set_defaults(run=_gateway)

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

    top = _command(commands, "top", "watch a server: rows, queue, rates, latencies, cache, ranks, events", "q quits")
    top.add_argument("--endpoint", default=default_endpoint(), help="of the server (default %(default)s)")
    _add_connection(top)
    top.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default %(default)g)"
    )
    top.set_defaults(run=_top)

    again = _command(commands, "replay", "run an event log again through the scheduler and verify every decision")
    add_replay_options(again)

    virtual = _command(commands, "simulate", "run the scheduler in virtual time and say how a workload would fare")
    add_simulate_options(virtual)
    bench = commands.add_parser("bench", help="measure a running server", allow_abbrev=False)
    load = _command(
        bench.add_subparsers(required=True, metavar="WHAT"),
        "serve",
        "ask a running server at times of our own, and say how it fared",
        "in percentiles and goodput",
    )
    add_bench_options(load)

    trace = _command(commands, "trace", "record what a server does, as a timeline", RECORDS)
    add_trace_command(trace, _add_connection, _client)
    drain = _command(commands, "drain", "have a server finish what it has, take nothing new and end", "and wait")
    drain.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="at most (default %(default)g)")
    reload = _command(
        commands, "reload", "have a server go on with other weights", "of the same shape; no request ends"
    )
    reload.add_argument("model", help=_MODEL)
    for control, does in ((drain, _drain), (reload, _reload)):
        control.add_argument("--endpoint", default=default_endpoint(), help="of the server, ipc (default %(default)s)")
        _add_connection(control)
        control.set_defaults(run=lambda options, does=does: asyncio.run(does(options)))

    keys = _command(commands, "keys", "make a CURVE key file for tcp endpoints", "and print the public key for clients")
    keys.add_argument(
        "file", type=Path, nargs="+", help="to make, readable only by you; an existing file is left alone"
    )
    keys.add_argument("--list", action="store_true", help="print the public keys of existing key files and allow lists")
    keys.set_defaults(run=_keys)
    return parser


_MODEL = "built-in name, directory with config.json and safetensors, GGUF file, or org/name on the hub"
_ENDPOINT = "ipc:///absolute/path or tcp://host:port"
_UNTIL = "until Ctrl-C or SIGTERM"
_EMBEDDED = "of the engines that run for this command, without --endpoint"
_SOURCE = "from a running server with --endpoint, else from engines that run for this one command"


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, does: str, more: str = ""
) -> argparse.ArgumentParser:
    # abbreviations off: a script that used one would break with the next option that begins alike
    description = f"{does[0].upper()}{does[1:]}{', ' * bool(more)}{more}."
    parser = commands.add_parser(name, help=does, description=description, allow_abbrev=False)
    parser.epilog = exit_codes(parser.prog.removeprefix("treadle "))
    parser.set_defaults(parser=parser)
    return parser


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", help=f"of a running server: {_ENDPOINT}, or `default`")
    _add_connection(parser)
    parser.add_argument("--model", help=f"without --endpoint: {_MODEL} (default {DEFAULT_MODEL})")
    parser.add_argument("--tenant", default="", metavar="NAME", help="on whose account, for the server's policy")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server-key", metavar="KEY", help="the server's public CURVE key, for tcp")
    parser.add_argument("--client-keys", type=Path, metavar="FILE", help="this client's own, for a server with --allow")
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
        drain_timeout=_grace(options.drain_timeout, "--drain-timeout"),
        limits=ClientLimits(requests=options.client_requests, messages_per_second=options.client_rate),
        allowed=read_allow_list(options.allow) if options.allow is not None else None,
        parent=tuple(options.parent) if options.parent is not None else None,
        http=options.http,
        gateway=gateway_settings(options),
    )
    if settings.options.random_weights:
        logging.getLogger("treadle").warning("RANDOM WEIGHTS: the answers mean nothing; for benchmarks only")
    return run(settings, _announce)


def _announce(endpoint: str) -> None:
    print(f"treadle: ready on {endpoint}", flush=True)


def _gateway(options: argparse.Namespace) -> int:
    check_extra()
    from .http.child import inherited, tell
    from .http.command import GatewayCommand, run

    settings = gateway_settings(options)
    if options.child is not None:
        held, report, descriptor = options.child
        lifeline.watch(held, [])
        settings = msgspec.json.decode(options.options, type=GatewaySettings)
        command = GatewayCommand(options.endpoint, options.server_key, inherited(descriptor), settings)
        return run(command, lambda url: tell(report))
    if options.http is None:
        raise ConfigError("give --http HOST:PORT: where the gateway is to listen")
    endpoint = default_endpoint() if options.endpoint == "default" else options.endpoint
    return run(GatewayCommand(endpoint, options.server_key, options.http, settings), _announce)


def _generate(options: argparse.Namespace) -> int:
    prompt = _standard_input() if options.prompt == "-" else _text(options.prompt, "the prompt")
    if not prompt:
        raise InvalidRequest("the prompt is empty: give some text")
    return asyncio.run(_stream(_open(options), prompt, _params(options), options.tenant))


async def _stream(frontend: Frontend, prompt: str, params: SamplingParams, tenant: str) -> int:
    async with frontend as llm:
        async for output in llm.generate(prompt, params, tenant=tenant):
            print(output.delta, end="", flush=True)
    print()
    return 0


def _chat(options: argparse.Namespace) -> int:
    system = None if options.system is None else _text(options.system, "--system")
    return asyncio.run(_converse(_open(options), system, _params(options), options.tenant))


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
                messages.append({"role": "assistant", "content": await _answer(llm, messages, params, tenant)})
            except (InvalidRequest, RequestFailed, Overloaded) as error:
                messages.pop()  # as if it had not been said: the conversation goes on
                print(f"treadle: {type(error).__name__}: {error}", file=sys.stderr)
    return 0


async def _answer(llm: Frontend, messages: list[dict[str, object]], params: SamplingParams, tenant: str) -> str:
    text = ""
    async for output in llm.chat(messages, params, tenant=tenant):
        print(output.delta, end="", flush=True)
        text = output.text
    print()
    return text


async def _info(options: argparse.Namespace, kind: str) -> int:
    async with _client(options) as client:
        answer = await (client.stats() if kind == "stats" else client.health())
    shown = {name: value for name, value in msgspec.structs.asdict(answer).items() if name != "id"}
    print(msgspec.json.format(msgspec.json.encode(shown)).decode())
    return HEALTH.get(answer.state, HEALTH["failed"]) if isinstance(answer, Health) else 0


def _top(options: argparse.Namespace) -> int:
    check_top_extra()
    from .top.command import run as run_top

    endpoint = default_endpoint() if options.endpoint == "default" else options.endpoint
    keys = read_keys(options.client_keys) if options.client_keys is not None else None
    patience = 2.0 if options.connect_timeout is None else options.connect_timeout
    return run_top(endpoint, options.server_key, keys, patience, options.interval)


async def _drain(options: argparse.Namespace) -> int:
    grace = _grace(options.grace, "--grace")
    async with _client(options) as client:
        await client.drain(grace or 1e-3)
        while True:  # its end is what we wait for
            try:
                await client.health()
            except (ServiceError, Overloaded):
                return 0
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)


async def _reload(options: argparse.Namespace) -> int:
    async with _client(options) as client:
        print(await client.reload(options.model))
    return 0


def _grace(seconds: float, name: str) -> float:
    if not 0 <= seconds <= 1e6:
        raise ConfigError(f"{name} {seconds!r}: allowed is 0 to 1e6 seconds")
    return seconds


def _keys(options: argparse.Namespace) -> int:
    for file in options.file:
        if options.list:
            for key in _public_keys(file):
                print(f"{key}  {file}")
        else:
            print(f"wrote {file}; the public key for clients (--server-key) is\n{write_keys(file).public}")
    return 0


def _public_keys(file: Path) -> tuple[str, ...]:
    """Of an allow list, or of a key file."""
    try:
        return read_allow_list(file)
    except ConfigError:
        return (read_keys(file).public,)


# ── options ──


def _open(options: argparse.Namespace) -> Frontend:
    values = service_values(options)
    if options.endpoint is None:
        for name in ("server_key", "client_keys", "connect_timeout"):
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
    return Client(endpoint, server_key=options.server_key, connect_timeout=seconds, keys=options.client_keys)


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
