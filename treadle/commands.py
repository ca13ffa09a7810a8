"""The commands of `treadle`: all of them, and how one is run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from treadle.errors import TreadleError
from treadle.scheduler.form import is_compiled

from . import __version__
from .asking import add_chat_command, add_generate_command
from .bench.command import add_bench_options
from .operating import add_control_commands, add_keys_command, add_look_commands
from .progress import show_on
from .reaching import add_command
from .replaying import add_replay_options
from .serving import add_gateway_command, add_serve_command
from .simulating import add_simulate_options
from .tracing import RECORDS, add_trace_command


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


def _version() -> str:
    return f"treadle {__version__}, scheduler compiled" if is_compiled() else f"treadle {__version__}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="treadle", description="Continuous-batching inference, embedded or served.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_serve_command(commands)
    add_gateway_command(commands)
    add_generate_command(commands)
    add_chat_command(commands)
    add_look_commands(commands)
    again = add_command(commands, "replay", "run an event log again through the scheduler and verify every decision")
    add_replay_options(again)
    virtual = add_command(commands, "simulate", "run the scheduler in virtual time and say how a workload would fare")
    add_simulate_options(virtual)
    bench = commands.add_parser("bench", help="measure a running server", allow_abbrev=False)
    load = add_command(
        bench.add_subparsers(required=True, metavar="WHAT"),
        "serve",
        "ask a running server at times of our own, and say how it fared",
        "in percentiles and goodput",
    )
    add_bench_options(load)
    trace = add_command(commands, "trace", "record what a server does, as a timeline", RECORDS)
    add_trace_command(trace)
    add_control_commands(commands)
    add_keys_command(commands)
    return parser
