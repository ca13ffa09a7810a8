"""Commands for whoever runs a server: how it is, its end, other weights, keys."""

from __future__ import annotations

import argparse
import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from treadle.errors import ConfigError, Overloaded, ServiceError
from treadle.transport.allow_list import read_allow_list
from treadle.transport.endpoints import default_endpoint, read_keys, write_keys
from treadle.transport.messages import Drain, Health, ServiceMessage

from .connecting import is_gone
from .exit_codes import HEALTH
from .reaching import MODEL, Commands, add_command, add_connection, check_grace, connect, endpoint_of
from .remote import RemoteBackend
from .top.extra import check_extra

_DRAIN_LOOK_SECONDS = 0.1


def add_look_commands(commands: Commands) -> None:
    """stats, health, top."""
    for kind in ("stats", "health"):
        info = add_command(commands, kind, f"print the {kind} of a server as JSON")
        info.add_argument("--endpoint", default=default_endpoint(), help="of the server (default %(default)s)")
        add_connection(info)
        info.set_defaults(run=lambda options, kind=kind: asyncio.run(_info(options, kind)))

    top = add_command(commands, "top", "watch a server: rows, queue, rates, latencies, cache, ranks, events", "q quits")
    top.add_argument("--endpoint", default=default_endpoint(), help="of the server (default %(default)s)")
    add_connection(top)
    top.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (default %(default)g)"
    )
    top.set_defaults(run=_top)


def add_control_commands(commands: Commands) -> None:
    """drain, reload."""
    drain = add_command(commands, "drain", "have a server finish what it has, take nothing new and end", "and wait")
    drain.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="at most (default %(default)g)")
    reload = add_command(
        commands, "reload", "have a server go on with other weights", "of the same shape; no request ends"
    )
    reload.add_argument("model", help=MODEL)
    for control, does in ((drain, _drain), (reload, _reload)):
        control.add_argument("--endpoint", default=default_endpoint(), help="of the server, ipc (default %(default)s)")
        add_connection(control)
        control.set_defaults(run=lambda options, does=does: asyncio.run(does(options)))


def add_keys_command(commands: Commands) -> None:
    keys = add_command(
        commands, "keys", "make a CURVE key file for tcp endpoints", "and print the public key for clients"
    )
    keys.add_argument(
        "file", type=Path, nargs="+", help="to make, readable only by you; an existing file is left alone"
    )
    keys.add_argument("--list", action="store_true", help="print the public keys of existing key files and allow lists")
    keys.set_defaults(run=_keys)


@asynccontextmanager
async def _reached(options: argparse.Namespace) -> AsyncIterator[RemoteBackend]:
    """The server as it is; a `Client` waits until it is ready."""
    backend = connect(options).backend()
    try:
        await backend.start()
        yield backend
    finally:
        await backend.close()


async def _info(options: argparse.Namespace, kind: str) -> int:
    if kind == "stats":
        async with connect(options) as client:
            answer: ServiceMessage = await client.stats()
    else:
        async with _reached(options) as server:
            answer = await server.info(kind)
    shown = {name: value for name, value in msgspec.structs.asdict(answer).items() if name != "id"}
    print(msgspec.json.format(msgspec.json.encode(shown)).decode())
    return HEALTH.get(answer.state, HEALTH["failed"]) if isinstance(answer, Health) else 0


def _top(options: argparse.Namespace) -> int:
    check_extra()
    from .top.command import run as run_top

    endpoint = endpoint_of(options)
    keys = read_keys(options.client_keys) if options.client_keys is not None else None
    patience = 2.0 if options.connect_timeout is None else options.connect_timeout
    return run_top(endpoint, options.server_key, keys, patience, options.interval)


async def _drain(options: argparse.Namespace) -> int:
    grace = check_grace(options.grace, "--grace")
    async with _reached(options) as server:
        await server.control(Drain(uuid.uuid4().hex, grace))
        drained = _service(server)
        while _service(server) == drained:  # another that comes to its place is not what we wait for
            try:
                await server.info("health")
            except Overloaded:
                break
            except ServiceError:
                if await is_gone(endpoint_of(options)):
                    break
                raise  # it is silent, which is no end
            await asyncio.sleep(_DRAIN_LOOK_SECONDS)
    return 0


def _service(server: RemoteBackend) -> str:
    """Its incarnation, whichever our session there."""
    return server.incarnation.partition("-")[0]


async def _reload(options: argparse.Namespace) -> int:
    async with connect(options) as client:
        print(await client.reload(options.model))
    return 0


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
