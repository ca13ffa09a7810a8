"""`treadle trace`: a timeline of a live server, in a file."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from treadle.errors import ConfigError
from treadle.transport.endpoints import default_endpoint

from .reaching import add_connection, connect

RECORDS = "for ui.perfetto.dev or chrome://tracing; over ipc only, on the server's own machine"


def add_trace_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=5.0, metavar="SECONDS", help="to record (default %(default)g)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("trace.json"), metavar="FILE", help="to write (default %(default)s)"
    )
    parser.add_argument("--endpoint", default=default_endpoint(), help="of the server, ipc (default %(default)s)")
    add_connection(parser)
    parser.set_defaults(run=lambda options: asyncio.run(_trace(options)))


async def _trace(options: argparse.Namespace) -> int:
    output: Path = options.output
    async with connect(options) as client:
        recorded = await client.trace(options.seconds)
    try:
        await asyncio.to_thread(output.write_bytes, recorded)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from error
    print(f"wrote {output}; open it at https://ui.perfetto.dev")
    return 0
