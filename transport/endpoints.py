"""Where sockets live: private directories for ipc, keys for tcp, and a clear no to everything else."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from treadle.errors import ConfigError, EndpointInUse

from . import leftovers

_MAX_RUNTIME_BASE = 60
_MAX_IPC_PATH = 100  # sun_path holds 108 bytes on Linux and 104 elsewhere, with the closing zero


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """CURVE keys, of a tcp server or of a client that it knows: 40 characters of Z85 each."""

    public: str
    secret: str


class RuntimeDir:
    """A 0700 directory for one service's sockets, logs and shared memory; removed by `remove`.

    Ranks remove it too when their parent vanishes, so it does not outlive a `kill -9` either; where they were killed as
    well, the next service does. Raises ConfigError.
    """

    def __init__(self) -> None:
        choices = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")
        fitting = [base for base in choices if base and os.access(base, os.W_OK) and len(base) < _MAX_RUNTIME_BASE]
        if not fitting:
            raise ConfigError(
                f"no directory for sockets: XDG_RUNTIME_DIR, TMPDIR and /tmp are missing, closed, or longer than "
                f"{_MAX_RUNTIME_BASE} characters"
            )
        try:
            leftovers.clear(Path(fitting[0]))
            self.path, self._lock = leftovers.make(Path(fitting[0]))
        except OSError as error:
            raise ConfigError(f"directory for sockets in {fitting[0]}: {error.strerror}") from error

    def endpoint(self, name: str) -> str:
        return f"ipc://{self.path / name}"

    def remove(self) -> None:
        """Safe to call twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def default_endpoint() -> str:
    """The endpoint that `treadle serve` binds and the other commands connect to when none is given."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "treadle" if runtime else Path(tempfile.gettempdir()) / f"treadle-{os.getuid()}"
    return f"ipc://{base / 'default.ipc'}"


def remove_default_directory(path: Path) -> None:
    """Nobody listens at `path` any more: the directory that was made for the default endpoint goes when it is empty."""
    if path == ipc_path(default_endpoint()):
        with suppress(OSError):
            path.parent.rmdir()


def ipc_path(endpoint: str) -> Path | None:
    """The file of an ipc endpoint, None for another transport."""
    return Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None


def check_scheme(endpoint: str) -> None:
    """Raises ConfigError unless `endpoint` is ipc:///absolute/path or tcp://host:port."""
    path = ipc_path(endpoint)
    if path is not None:
        if not path.is_absolute():
            raise ConfigError(f"endpoint {endpoint!r}: an ipc endpoint needs an absolute path, ipc:///run/me/x.ipc")
        if len(os.fsencode(path)) > _MAX_IPC_PATH:
            raise ConfigError(f"endpoint {endpoint!r}: the path is longer than {_MAX_IPC_PATH} bytes")
        return
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not (port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"endpoint {endpoint!r}: allowed are ipc:///absolute/path and tcp://host:port")


def check_server(endpoint: str, keys: ServerKeys | None) -> None:
    """Raises ConfigError for an endpoint that could never be bound: a wrong form, or tcp without keys."""
    check_scheme(endpoint)
    if endpoint.startswith("tcp://") and keys is None:
        raise ConfigError(f"{endpoint}: tcp needs CURVE keys; make some with `treadle keys` and pass --keys FILE")


def bind_server(sock: zmq.Socket[bytes], endpoint: str, keys: ServerKeys | None) -> None:
    """Binds a server socket safely.

    ipc: the directory is made with mode 0700, or must already be ours and closed to others. tcp: needs `keys`.
    Raises ConfigError, and EndpointInUse when somebody answers there (libzmq would silently take an ipc path over).
    """
    check_server(endpoint, keys)
    path = ipc_path(endpoint)
    if path is not None:
        _private_directory(path.parent)
        _no_other_file(path)
        if _answers(path):
            raise EndpointInUse(f"{endpoint}: another server listens there; stop it or choose another path")
    elif keys is not None:
        sock.zap_domain = b"treadle"  # without a handler (`AllowList`) whoever knows the public key may come
        sock.curve_server = True
        sock.curve_secretkey = keys.secret.encode()
        sock.curve_publickey = keys.public.encode()
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise EndpointInUse(f"{endpoint}: the address is in use; stop who holds it or choose another") from error
        raise ConfigError(f"{endpoint}: cannot bind: {error}") from error
    if path is not None:
        path.chmod(0o600)


def check_client(endpoint: str, server_key: str | None) -> None:
    """Raises ConfigError for what could never connect: a wrong form, or tcp without the server's public CURVE key."""
    check_scheme(endpoint)
    if not endpoint.startswith("tcp://"):
        return
    if endpoint.startswith("tcp://*:"):
        raise ConfigError(f"endpoint {endpoint!r}: * is for servers; name the host to connect to")
    if server_key is None:
        raise ConfigError(f"{endpoint}: tcp needs the server's public CURVE key (server_key=…, --server-key …)")
    if type(server_key) is not str or not is_key(server_key):
        raise ConfigError("server_key: a CURVE key has 40 characters of Z85; `treadle keys` printed the server's")


def connect_client(
    sock: zmq.Socket[bytes], endpoint: str, server_key: str | None, keys: ServerKeys | None = None
) -> None:
    """Connects a client socket; tcp needs the server's public CURVE key. keys: the client's, None makes a pair.

    Raises ConfigError, for an ipc socket of another user too: whoever has it would read our prompts.
    """
    check_client(endpoint, server_key)
    path = ipc_path(endpoint)
    if path is not None:
        _ours(path)
    if server_key is not None and endpoint.startswith("tcp://"):
        sock.curve_serverkey = server_key.encode()
        pair = (keys.public.encode(), keys.secret.encode()) if keys is not None else zmq.curve_keypair()
        sock.curve_publickey, sock.curve_secretkey = pair
    try:
        sock.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConfigError(f"{endpoint}: not an address to connect to: {error}") from error


def read_keys(path: Path) -> ServerKeys:
    """Reads a file that `write_keys` made; raises ConfigError when others may read it or it is not such a file."""
    try:
        mode = path.stat().st_mode
        lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    except OSError as error:
        raise ConfigError(f"keys {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"keys {path}: not a key file of `treadle keys`") from error
    if mode & 0o077:
        raise ConfigError(f"keys {path}: others may read the file; chmod 600 it")
    keys = ServerKeys(lines.get("public", ""), lines.get("secret", ""))
    if not is_key(keys.public) or not is_key(keys.secret):
        raise ConfigError(f"keys {path}: expected lines public=… and secret=…, 40 characters each")
    return keys


def is_key(text: str) -> bool:
    """Whether it is a CURVE key: 32 bytes as 40 characters of Z85 (ZeroMQ RFC 32)."""
    try:
        return len(z85.decode(text.encode())) == 32
    except (ValueError, KeyError):
        return False


def write_keys(path: Path) -> ServerKeys:
    """Makes a key pair and writes it with mode 0600; never overwrites. Raises ConfigError."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"keys {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(f"public={public}\nsecret={secret}\n")
    return ServerKeys(public, secret)


def _private_directory(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as error:
        raise ConfigError(f"directory {path}: {error.strerror}") from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(
            f"directory {path}: an ipc endpoint needs a directory of your own that is closed to others "
            f"(mode 0700, not {stat.S_IMODE(info.st_mode):04o}); any program that can connect can use the model"
        )


def _ours(path: Path) -> None:
    try:
        owner = path.stat().st_uid
    except OSError:
        return  # nobody is there yet
    if owner not in (os.getuid(), 0):
        raise ConfigError(
            f"{path}: the socket belongs to user {owner}, neither to you nor to root: it is not connected to"
        )


def _no_other_file(path: Path) -> None:
    """libzmq removes whatever stands where it binds."""
    if os.path.lexists(path) and not path.is_socket():
        raise ConfigError(f"{path}: something that is not a socket is there; choose another path for the endpoint")


def _answers(path: Path) -> bool:
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1.0)
        probe.connect(str(path))
    except OSError:
        return False
    finally:
        probe.close()
    return True
