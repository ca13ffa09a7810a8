"""`treadle serve` and `treadle gateway`: what they may be told, and what they begin with."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import msgspec

from treadle.engine import lifeline
from treadle.errors import ConfigError
from treadle.scheduler.client_limits import ClientLimits
from treadle.scheduler.options import service_options
from treadle.transport.allow_list import read_allow_list
from treadle.transport.endpoints import default_endpoint, read_keys

from .flags import add_service_options, service_values
from .http.extra import check_extra
from .http.flags import add_gateway_options, gateway_settings
from .http.settings import GatewaySettings
from .reaching import DEFAULT_MODEL, ENDPOINT, MODEL, Commands, add_command, check_grace, endpoint_of

_UNTIL = "until Ctrl-C or SIGTERM"


def add_serve_command(commands: Commands) -> None:
    serve = add_command(commands, "serve", "serve a model on a ZeroMQ endpoint", _UNTIL)
    serve.add_argument("model", nargs="?", default=DEFAULT_MODEL, help=MODEL + " (default %(default)s)")
    serve.add_argument("--endpoint", default=default_endpoint(), help=ENDPOINT + " (default %(default)s)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="key file that `treadle keys` made; tcp needs it")
    serve.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="to finish what runs after the first signal to end; another ends at once (default %(default)g)",
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


def add_gateway_command(commands: Commands) -> None:
    gateway = add_command(commands, "gateway", "serve OpenAI's HTTP API in front of a running server", _UNTIL)
    gateway.add_argument("endpoint", help=f"of the server: {ENDPOINT}, or `default`")
    gateway.add_argument("--server-key", metavar="KEY", help="the server's public CURVE key, for tcp")
    gateway.add_argument("--child", type=int, nargs=3, default=None, help=argparse.SUPPRESS)
    gateway.add_argument("--options", default=None, help=argparse.SUPPRESS)
    add_gateway_options(gateway)
    gateway.set_defaults(run=_gateway)


def _serve(options: argparse.Namespace) -> int:
    from .serve import ServeSettings, run

    values = msgspec.json.decode(options.options) if options.options is not None else service_values(options)
    settings = ServeSettings(
        model=options.model,
        endpoint=options.endpoint,
        options=service_options(**values),
        keys=read_keys(options.keys) if options.keys is not None else None,
        drain_timeout=check_grace(options.drain_timeout, "--drain-timeout"),
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
    endpoint = endpoint_of(options)
    return run(GatewayCommand(endpoint, options.server_key, options.http, settings), _announce)
