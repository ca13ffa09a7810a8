"""The flags of the gateway, for `treadle serve --http` and `treadle gateway`."""

from __future__ import annotations

import argparse

from treadle.errors import ConfigError

from .settings import GatewaySettings

_DEFAULTS = GatewaySettings()


def add_gateway_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP gateway", "needs pip install 'treadle[http]'")
    group.add_argument("--http", metavar="HOST:PORT", help="serve OpenAI's HTTP API there, 127.0.0.1:8000 for example")
    group.add_argument(
        "--api-keys",
        metavar="FILE",
        help="a key a line, then its tenant if it has one; the environment's TREADLE_API_KEYS may hold keys, too "
        "(default: anybody may ask)",
    )
    group.add_argument(
        "--model-name",
        action="append",
        metavar="NAME",
        help="what clients may call the model; may be repeated (default: as the server calls it)",
    )
    group.add_argument(
        "--max-body-bytes", type=int, metavar="INT", help=f"of a request (default {_DEFAULTS.max_body_bytes})"
    )
    group.add_argument(
        "--max-open-requests",
        type=int,
        metavar="INT",
        help=f"at once; more are answered with 429 (default {_DEFAULTS.max_open_requests})",
    )


def gateway_settings(options: argparse.Namespace) -> GatewaySettings:
    """Not checked yet. Raises ConfigError for options of a gateway where there is none."""
    flags = {
        "--api-keys": ("api_keys", options.api_keys),
        "--model-name": ("model_names", options.model_name),
        "--max-body-bytes": ("max_body_bytes", options.max_body_bytes),
        "--max-open-requests": ("max_open_requests", options.max_open_requests),
    }
    given = {flag: pair for flag, pair in flags.items() if pair[1] is not None}
    if given and options.http is None:
        raise ConfigError(f"{', '.join(given)}: of the HTTP gateway; give --http HOST:PORT, too")
    return GatewaySettings(**dict(given.values()))
