"""Which CURVE clients may connect: ZeroMQ asks a handler inside the process (ZAP, ZeroMQ RFC 27), and this is it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import zmq
from zmq.utils import z85

from treadle.errors import ConfigError

from .channel import Channel
from .endpoints import is_key

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_FRAMES = 7


class AllowList:
    """Answers for every socket of `context` that asks (`zap_domain`). Make it before the socket binds.

    allowed: public keys in Z85. refused: how many connections were not let in.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], allowed: Iterable[str]) -> None:
        self._allowed = frozenset(z85.decode(key.encode()) for key in allowed)
        self.refused = 0
        socket = context.socket(zmq.REP)
        socket.linger = 0
        socket.bind(_ZAP_ENDPOINT)
        self._channel = Channel(socket, self._answer)

    def close(self) -> None:
        self._channel.close()

    def _answer(self, frames: list[bytes]) -> None:
        version, number = (frames[0], frames[1]) if len(frames) >= 2 else (b"1.0", b"")
        known = len(frames) == _FRAMES and frames[5] == b"CURVE" and frames[6] in self._allowed
        self.refused += not known
        code, text = (b"200", b"OK") if known else (b"400", b"this key is not on the server's list")
        self._channel.send([version, number, code, text, b"", b""])


def read_allow_list(path: Path) -> tuple[str, ...]:
    """Public keys of a text file: one a line, whatever follows it is a comment. Raises ConfigError."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"allow list {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"allow list {path}: not a text file") from error
    keys = [line.split()[0] for line in lines if line.strip()]
    for key in keys:
        if not is_key(key):
            raise ConfigError(f"allow list {path}: {key[:50]!r} is not a public key of 40 characters")
    if not keys:
        raise ConfigError(f"allow list {path}: it has no key, so nobody could connect")
    return tuple(keys)
