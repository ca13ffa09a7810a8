"""What several commands share: their form, and which server or model they are for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from treadle.errors import ConfigError
from treadle.transport.endpoints import default_endpoint

from .client import Client
from .exit_codes import exit_codes
from .flags import flag, service_values
from .frontend import Frontend
from .llm import LLM

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DEFAULT_MODEL = "smollm2-135m"
MODEL = "built-in name, directory with config.json and safetensors, GGUF file, or org/name on the hub"
ENDPOINT = "ipc:///absolute/path or tcp://host:port"
_CONNECT_SECONDS = 10.0


def add_command(commands: Commands, name: str, does: str, more: str = "") -> argparse.ArgumentParser:
    # abbreviations off: a script that used one would break with the next option that begins alike
    description = f"{does[0].upper()}{does[1:]}{', ' * bool(more)}{more}."
    parser = commands.add_parser(name, help=does, description=description, allow_abbrev=False)
    parser.epilog = exit_codes(parser.prog.removeprefix("treadle "))
    parser.set_defaults(parser=parser)
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", help=f"of a running server: {ENDPOINT}, or `default`")
    add_connection(parser)
    parser.add_argument("--model", help=f"without --endpoint: {MODEL} (default {DEFAULT_MODEL})")
    parser.add_argument("--tenant", default="", metavar="NAME", help="on whose account, for the server's policy")


def add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server-key", metavar="KEY", help="the server's public CURVE key, for tcp")
    parser.add_argument("--client-keys", type=Path, metavar="FILE", help="this client's own, for a server with --allow")
    parser.add_argument(
        "--connect-timeout",
        type=float,
        metavar="SECONDS",
        help=f"for the server's answer (default {_CONNECT_SECONDS:g})",
    )


def open_frontend(options: argparse.Namespace) -> Frontend:
    """A server's client, or engines of our own. Raises ConfigError for options that are of the other one."""
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
    return connect(options)


def connect(options: argparse.Namespace) -> Client:
    """To the server that `add_connection` has options for."""
    seconds = _CONNECT_SECONDS if options.connect_timeout is None else options.connect_timeout
    endpoint = endpoint_of(options)
    return Client(endpoint, server_key=options.server_key, connect_timeout=seconds, keys=options.client_keys)


def endpoint_of(options: argparse.Namespace) -> str:
    """`default` is where `treadle serve` is by default."""
    return default_endpoint() if options.endpoint == "default" else str(options.endpoint)


def check_grace(seconds: float, name: str) -> float:
    """Raises ConfigError that names the option."""
    if not 0 <= seconds <= 1e6:
        raise ConfigError(f"{name} {seconds!r}: allowed is 0 to 1e6 seconds")
    return seconds
