"""Finding out at once that nobody will answer.

libzmq connects in the background and tries again for ever, which is right once a server was there, and a long silence
where none ever was. So a plain connection is tried first, and the first handshake is watched.
"""

from __future__ import annotations

import asyncio
import socket
import stat

import zmq
from zmq.utils.monitor import parse_monitor_message

from treadle.errors import HandshakeFailed, ServerLost
from treadle.transport.channel import Channel
from treadle.transport.endpoints import default_endpoint, ipc_path

_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED
_ATTEMPTS = 2


async def probe(endpoint: str) -> None:
    """Connects and hangs up. Raises ServerLost, which says how to start a server, when nobody listens at `endpoint`."""
    try:
        await _call(endpoint)
    except (FileNotFoundError, NotADirectoryError):
        raise ServerLost(f"{endpoint}: there is no such socket, so no server runs; {_how(endpoint)}") from None
    except ConnectionRefusedError:
        left = "its socket is left from one that ended" if ipc_path(endpoint) else "the connection was refused"
        raise ServerLost(f"{endpoint}: no server runs there ({left}); {_how(endpoint)}") from None
    except socket.gaierror as error:
        raise ServerLost(f"{endpoint}: the host is not known: {error.strerror}") from error
    except OSError as error:
        raise ServerLost(f"{endpoint}: it cannot be reached: {error.strerror or error}") from error


async def is_gone(endpoint: str) -> bool:
    """Whether it is certain that nobody listens there; a network that fails just now is no certainty."""
    try:
        await _call(endpoint)
    except (FileNotFoundError, ConnectionRefusedError):
        return True
    except (OSError, ServerLost):
        return False
    return False


async def _call(endpoint: str) -> None:
    path = ipc_path(endpoint)
    if path is not None:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ServerLost(f"{endpoint}: what is there is not a socket, so it is not the endpoint of a server")
        _, writer = await asyncio.open_unix_connection(path)
    else:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port), family=socket.AF_INET)  # as libzmq does
    writer.transport.abort()


def _how(endpoint: str) -> str:
    where = "" if endpoint == default_endpoint() else f" --endpoint {endpoint}"
    return f"start one with `treadle serve MODEL{where}` and wait until it says `ready`"


class FirstHandshake:
    """Watches a socket that is about to connect. Made on the loop's thread; `close` it before the socket."""

    def __init__(self, sock: zmq.Socket[bytes], endpoint: str) -> None:
        self._socket = sock
        self._endpoint = endpoint
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failures = 0
        self._will_retry = False
        self._channel = Channel(sock.get_monitor_socket(_EVENTS), self._event)

    async def wait(self) -> None:
        """Returns when a handshake succeeded. Raises HandshakeFailed when the other side does not want us."""
        await self._done

    def close(self) -> None:
        self._socket.disable_monitor()
        self._channel.close()

    def _event(self, frames: list[bytes]) -> None:
        if self._done.done():
            return
        event = parse_monitor_message(frames)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._done.set_result(None)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            # The other side hung up, which is how CURVE says no; once may also be a server that ended just then.
            self._failures += 1
            self._will_retry = self._failures < _ATTEMPTS
        elif self._will_retry:
            self._will_retry = False
        else:  # after any other failure libzmq does not connect again
            self._done.set_exception(HandshakeFailed(self._why()))

    def _why(self) -> str:
        if ipc_path(self._endpoint) is not None:
            return f"{self._endpoint}: what listens there is not a treadle server"
        if self._failures:
            return (
                f"{self._endpoint}: the server refused the connection: server_key (--server-key) is not its public "
                "key, which `treadle keys` printed and its key file holds, or it is not a treadle server"
            )
        return f"{self._endpoint}: what listens there is not a treadle server with CURVE keys"
