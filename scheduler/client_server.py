"""The ZeroMQ endpoint for clients: one ROUTER socket, one bounded session per client."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import zmq

from treadle.errors import Overloaded, ProtocolError, TreadleError
from treadle.transport.channel import Channel
from treadle.transport.codec import service_codec
from treadle.transport.endpoints import ServerKeys, bind_server, ipc_path
from treadle.transport.messages import (
    Abort,
    Deltas,
    Message,
    Ping,
    Pong,
    Refused,
    Submit,
)
from treadle.transport.sockets import service_socket

from .delivery import Sink
from .service import Service

_SEND_HIGH_WATER = 1_000
_MAX_BACKLOG = 10_000
_SILENCE_SECONDS = 15.0
_SWEEP_SECONDS = 1.0


class ClientServer:
    """Serves `service` on `endpoint`. Raises ConfigError or EndpointInUse when it cannot be bound."""

    def __init__(self, service: Service, endpoint: str, keys: ServerKeys | None = None) -> None:
        self._service = service
        self._endpoint = endpoint
        self._codec = service_codec()
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[bytes, _Session] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = service_socket(self._context, _SEND_HIGH_WATER)
        try:
            bind_server(socket, endpoint, keys)
        except BaseException:
            socket.close(0)
            self._context.term()
            raise
        self._channel = Channel(socket, self._receive, self._retry)

    def close(self) -> None:
        """Closes the socket; what was already sent still goes out."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._channel.close(linger_ms=500)
        self._context.term()
        path: Path | None = ipc_path(self._endpoint)
        if path is not None:
            path.unlink(missing_ok=True)

    def send(self, identity: bytes, message: Message) -> bool:
        """False when the client's queue is full. Raises zmq.ZMQError when the client is gone."""
        return self._channel.send([identity, self._codec.encode(message)])

    def drop(self, session: _Session) -> None:
        """The client is gone, or reads too slowly to be kept: its requests end."""
        self._sessions.pop(session.identity, None)
        self._service.detach(session)

    def _receive(self, frames: list[bytes]) -> None:
        identity, *parts = frames
        session = self._sessions.get(identity)
        if session is None:
            session = self._sessions[identity] = _Session(self, identity)
            self._arm()
        session.last_heard = self._loop.time()
        try:
            if len(parts) != 1:
                raise ProtocolError(f"a message of {len(parts)} frames: exactly one is allowed")
            message = self._codec.decode(parts[0])
        except ProtocolError as error:
            self._service.bad_frames += 1
            session.post(Refused("", error.code, str(error)))
            return
        if isinstance(message, Submit):
            self._submit(message, session)
        elif isinstance(message, Abort):
            self._service.abort(message, session)
        elif isinstance(message, Ping):
            session.post(Pong(message.nonce, self._service.incarnation))
        else:
            session.post(self._service.answer(message))

    def _submit(self, message: Submit, session: _Session) -> None:
        try:
            self._service.submit(message, session)
        except TreadleError as error:
            retry_after = error.retry_after if isinstance(error, Overloaded) else 0.0
            session.post(Refused(message.id, error.code, str(error), retry_after))

    def _retry(self) -> None:
        for session in list(self._sessions.values()):
            session.drain()

    def _arm(self) -> None:
        if self._sweeper is None and self._sessions:
            self._sweeper = self._loop.call_later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Ends the sessions that have been silent: clients ping while they are open."""
        self._sweeper = None
        oldest = self._loop.time() - _SILENCE_SECONDS
        for session in [s for s in self._sessions.values() if s.last_heard < oldest]:
            self.drop(session)
        self._arm()


class _Session(Sink):
    """One client. What its socket does not take waits here, up to a bound."""

    def __init__(self, server: ClientServer, identity: bytes) -> None:
        super().__init__(identity.hex())
        self.identity = identity
        self.last_heard = 0.0
        self._server = server
        self._backlog: deque[Message] = deque()

    def flush(self) -> None:
        self.post(Deltas(self.take()))

    def post(self, message: Message) -> None:
        """Sends in order; cuts the client off when it is gone or too far behind."""
        self._backlog.append(message)
        if len(self._backlog) > _MAX_BACKLOG:
            self._cut()
        else:
            self.drain()

    def drain(self) -> None:
        try:
            while self._backlog and self._server.send(self.identity, self._backlog[0]):
                self._backlog.popleft()
        except zmq.ZMQError:
            self._cut()

    def _cut(self) -> None:
        # Later, not now: this may be in the middle of a step's delivery, which must not change what it iterates over.
        self._backlog.clear()
        asyncio.get_running_loop().call_soon(self._server.drop, self)
