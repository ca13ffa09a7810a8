"""How a gateway was asked to behave."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec

from treadle.errors import ConfigError, EndpointInUse
from treadle.transport.params import MAX_TENANT

_BACKLOG = 2048


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Keys are not here but in a file or the environment, so that they show in no list of processes.

    api_keys: a file with one key a line, and its tenant after it where it has one. model_names: what clients may call
    the model; none: as the server calls it. max_body_bytes: of a request's body; more is 413. max_open_requests: at
    once; more are 429. body_seconds: for a body to arrive. stop_seconds: for open requests to end when the gateway is
    told to stop.
    """

    api_keys: str | None = None
    model_names: list[str] = []
    max_body_bytes: int = 8 << 20
    max_open_requests: int = 4096
    body_seconds: float = 60.0
    stop_seconds: float = 5.0


def check_settings(settings: GatewaySettings) -> None:
    """Raises ConfigError, which names what is wrong and what is allowed."""
    for name, value, low, high in (
        ("max_body_bytes", settings.max_body_bytes, 1024, 1 << 30),
        ("max_open_requests", settings.max_open_requests, 1, 1 << 20),
        ("body_seconds", settings.body_seconds, 0.1, 86_400),
        ("stop_seconds", settings.stop_seconds, 0.0, 86_400),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}={value!r}: allowed is {low} to {high}")
    if not all(settings.model_names):
        raise ConfigError("an empty model name: give it at least one character")


def listen(address: str) -> socket.socket:
    """A listening TCP socket at "HOST:PORT"; port 0 takes a free one. Raises ConfigError and EndpointInUse."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ConfigError(f"HTTP address {address!r}: HOST:PORT is allowed, 127.0.0.1:8000 or [::1]:8000 for example")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"HTTP address {address!r}: {error.strerror}") from error
    family, _, _, _, where = found[0]
    try:
        return socket.create_server(where[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        kind = EndpointInUse if "in use" in str(error) else ConfigError
        raise kind(f"HTTP address {address!r}: {error.strerror}") from error


def url_of(listener: socket.socket) -> str:
    """What a client on this machine would type."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_local(listener: socket.socket) -> bool:
    """Whether only programs of this machine can connect."""
    host = str(listener.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def read_key_file(path: Path) -> dict[str, str]:
    """Keys with their tenants, "" for none: `KEY` or `KEY TENANT`, one a line; blank lines and lines that begin with #
    do not count. Raises ConfigError."""
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except OSError as error:
        raise ConfigError(f"API keys {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"API keys {path}: not a text file") from error
    if mode & 0o077:
        raise ConfigError(f"API keys {path}: others may read the file; chmod 600 it")
    keys: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, *tenant = line.split() or ("#",)
        if key.startswith("#"):
            continue
        if len(tenant) > 1 or any(len(name) > MAX_TENANT for name in tenant):
            raise ConfigError(f"API keys {path}, line {number}: KEY or KEY TENANT (of at most {MAX_TENANT}) is allowed")
        if keys.setdefault(key, *tenant or ("",)) != "".join(tenant):
            raise ConfigError(f"API keys {path}, line {number}: this key has another tenant above")
    if not keys:
        raise ConfigError(f"API keys {path}: no key in it; one a line is expected")
    return keys
