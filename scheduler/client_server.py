"""The ZeroMQ endpoint for clients: one ROUTER socket, one bounded session per client."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from pathlib import Path

import zmq

from treadle.errors import Overloaded, ProtocolError, ServiceClosed, TreadleError
from treadle.transport.channel import Channel
from treadle.transport.codec import service_codec
from treadle.transport.endpoints import ServerKeys, bind_server, default_endpoint, ipc_path
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

from .delivery import Sink, refusal
from .service import Service

logger = logging.getLogger("treadle")
_SEND_HIGH_WATER = 1_000
_MAX_BACKLOG = 10_000
_MAX_SESSIONS = 10_000
_SILENCE_SECONDS = 15.0
_SWEEP_SECONDS = 1.0


class ClientServer:
    """Serves `service` on `endpoint`. Raises ConfigError or EndpointInUse when it cannot be bound.

    private: the one client is our parent, whose life the lifeline watches, so its silence means nothing.
    """

    def __init__(
        self, service: Service, endpoint: str, keys: ServerKeys | None = None, *, private: bool = False
    ) -> None:
        self._service = service
        self._endpoint = endpoint
        self._codec = service_codec()
        self._loop = asyncio.get_running_loop()
        self._private = private
        self._sessions: dict[bytes, _Session] = {}
        self._opened = 0
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
        """Tells the clients whose requests are open, then closes the socket; what was sent still goes out."""
        for identity, session in self._sessions.items():
            for request_id in session.open:
                self._tell(identity, Refused(request_id, ServiceClosed.code, "the server was stopped"))
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._channel.close(linger_ms=500)
        self._context.term()
        path: Path | None = ipc_path(self._endpoint)
        if path is not None:
            path.unlink(missing_ok=True)
            if self._endpoint == default_endpoint():
                with suppress(OSError):
                    path.parent.rmdir()

    def send(self, identity: bytes, message: Message) -> bool:
        """False when the client's queue is full. Raises zmq.ZMQError when the client is gone."""
        return self._channel.send([identity, self._codec.encode(message)])

    def drop(self, session: _Session) -> None:
        """The client is gone, or reads too slowly to be kept: its requests end.

        Should it come back, it finds a session of another number in its Pong, and knows.
        """
        if self._sessions.get(session.identity) is session:
            del self._sessions[session.identity]
        self._service.detach(session)

    def _receive(self, frames: list[bytes]) -> None:
        identity, *parts = frames
        try:
            if len(parts) != 1:
                raise ProtocolError(f"a message of {len(parts)} frames: exactly one is allowed")
            message = self._codec.decode(parts[0])
            session = self._session(identity)
        except TreadleError as error:
            self._service.bad_frames += 1
            self._tell(identity, refusal("", error))
            return
        if isinstance(message, Submit):
            self._submit(message, session)
        elif isinstance(message, Abort):
            self._service.abort(message, session)
        elif isinstance(message, Ping):
            session.post(Pong(message.nonce, f"{self._service.incarnation}-{session.number}"))
        else:
            session.post(self._service.answer(message))

    def _session(self, identity: bytes) -> _Session:
        session = self._sessions.get(identity)
        if session is None:
            if len(self._sessions) >= _MAX_SESSIONS:
                raise Overloaded(f"{_MAX_SESSIONS} clients are connected, which is the limit", _SILENCE_SECONDS)
            self._opened += 1
            session = self._sessions[identity] = _Session(self, identity, self._opened)
            self._arm()
        session.last_heard = self._loop.time()
        return session

    def _tell(self, identity: bytes, message: Message) -> None:
        """An answer to somebody without a session; lost when it cannot be sent."""
        with suppress(zmq.ZMQError):
            self.send(identity, message)

    def _submit(self, message: Submit, session: _Session) -> None:
        try:
            self._service.submit(message, session)
        except Exception as error:  # one client's request must not reach the others, whatever it did
            if not isinstance(error, TreadleError):
                logger.exception("a request raised")
            session.post(refusal(message.id, error))

    def _retry(self) -> None:
        for session in list(self._sessions.values()):
            session.drain()

    def _arm(self) -> None:
        if self._sweeper is None and self._sessions and not self._private:
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

    def __init__(self, server: ClientServer, identity: bytes, number: int) -> None:
        super().__init__(f"client-{number}")
        self.identity = identity
        self.number = number
        self._gone = False
        self.last_heard = 0.0
        self._server = server
        self._backlog: deque[Message] = deque()

    def flush(self) -> None:
        self.post(Deltas(self.take()))

    def refuse(self, refused: Refused) -> None:
        self.post(refused)

    def post(self, message: Message) -> None:
        """Sends in order; cuts the client off when it is gone or too far behind."""
        if self._gone:
            return
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
        self._gone = True
        asyncio.get_running_loop().call_soon(self._server.drop, self)
