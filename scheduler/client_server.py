"""The ZeroMQ endpoint for clients: one ROUTER socket, one bounded session per client."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from treadle.errors import InvalidRequest, Overloaded, ProtocolError, ServiceClosed, TreadleError
from treadle.transport.allow_list import AllowList
from treadle.transport.channel import Channel
from treadle.transport.codec import service_codec
from treadle.transport.endpoints import ServerKeys, bind_server, ipc_path, remove_default_directory
from treadle.transport.messages import (
    Abort,
    ControlMessage,
    Done,
    Drain,
    Live,
    Message,
    Ping,
    Pong,
    Record,
    Refused,
    Reload,
    ServiceMessage,
    Submit,
)
from treadle.transport.sockets import service_socket

from .client_limits import Allowance, ClientLimits
from .delivery import Sink, refusal
from .service import Service

logger = logging.getLogger("treadle")
Control = Callable[[ControlMessage], Awaitable[str]]
_SEND_HIGH_WATER = 64  # messages of any size, in the socket; what is over it waits here, and is counted in bytes
_MAX_SESSIONS = 10_000
_SILENCE_SECONDS = 15.0
_SWEEP_SECONDS = 1.0


class ClientServer:
    """Serves `service` on `endpoint`. Raises ConfigError or EndpointInUse when it cannot be bound.

    control: does what a Drain or Reload asks for and says how it went, or raises. Only who reaches an ipc endpoint,
    which is closed to other users, may ask. limits: of each client. allowed: public CURVE keys of those who may connect
    over tcp; None lets in everybody who knows the server's.

    private: the one client is our parent, whose life the lifeline watches, so its silence means nothing.
    """

    def __init__(
        self,
        service: Service,
        endpoint: str,
        keys: ServerKeys | None = None,
        *,
        private: bool = False,
        control: Control | None = None,
        limits: ClientLimits | None = None,
        allowed: Sequence[str] | None = None,
    ) -> None:
        self._limits = limits or ClientLimits()
        self._control = control
        self._controlling: set[asyncio.Task[None]] = set()
        self._service = service
        self._endpoint = endpoint
        self._codec = service_codec()
        self._loop = asyncio.get_running_loop()
        self._private = private
        self._sessions: dict[bytes, _Session] = {}
        self._opened = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_due = 0.0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._allow_list = AllowList(self._context, allowed) if allowed is not None else None
        socket = service_socket(self._context, _SEND_HIGH_WATER)
        try:
            bind_server(socket, endpoint, keys)
        except BaseException:
            socket.close(0)
            self._close_allow_list()
            self._context.term()
            raise
        self._channel = Channel(socket, self._receive, self._retry)

    def close(self) -> None:
        """Tells the clients whose requests are open, then closes the socket; what was sent still goes out."""
        for identity, session in self._sessions.items():
            for request_id in session.open:
                self._tell(identity, Refused(request_id, ServiceClosed.code, "the server was stopped"))
        for task in self._controlling:
            task.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._channel.close(linger_ms=500)
        self._close_allow_list()
        self._context.term()
        path: Path | None = ipc_path(self._endpoint)
        if path is not None:
            path.unlink(missing_ok=True)
            remove_default_directory(path)

    def _close_allow_list(self) -> None:
        if self._allow_list is not None:
            self._allow_list.close()

    def encode(self, message: Message) -> bytes:
        return self._codec.encode(message)

    def send(self, identity: bytes, frame: bytes) -> bool:
        """False when the client's queue is full. Raises zmq.ZMQError when the client is gone."""
        return self._channel.send([identity, frame])

    def drop(self, session: _Session, why: str) -> None:
        """The client is gone, or reads too slowly to be kept: its requests end.

        Should it come back, it finds a session of another number in its Pong, and knows. It must not be told that its
        requests were aborted: it never asked for that, and may want them to go on.
        """
        session.mute()
        if session.open:
            logger.info("%s %s: %d requests of it end", session.name, why, len(session.open))
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
        except Overloaded as error:
            self._tell(identity, refusal("", error))
            return
        except TreadleError as error:
            self._service.observers.telemetry.bad_frames += 1
            self._tell(identity, refusal("", error))
            return
        try:
            session.allowance.message(self._loop.time(), len(parts[0]))
        except Overloaded as error:
            if not isinstance(message, Ping | Abort):
                if isinstance(message, Submit):
                    self._service.note_refused(message, error)
                session.post(refusal(message.id, error))
                return
        if isinstance(message, Submit):
            self._submit(message, session)
        elif isinstance(message, Abort):
            self._service.abort(message, session)
        elif isinstance(message, Ping):
            incarnation = f"{self._service.incarnation}-{session.number}"
            session.post(Pong(message.nonce, incarnation, session.received))
        elif isinstance(message, Drain | Reload | Record):
            work = self._record(message, session) if isinstance(message, Record) else self._do(message, session)
            task = self._loop.create_task(work, name="treadle-control")
            self._controlling.add(task)
            task.add_done_callback(self._controlling.discard)
        else:
            session.allowance.answered(session.post(self._told(self._service.answer(message))))

    def _session(self, identity: bytes) -> _Session:
        session = self._sessions.get(identity)
        if session is None:
            if len(self._sessions) >= _MAX_SESSIONS:
                raise Overloaded(f"{_MAX_SESSIONS} clients are connected, which is the limit", _SILENCE_SECONDS)
            self._opened += 1
            session = self._sessions[identity] = _Session(self, identity, self._opened, self._limits)
            self._arm()
        session.last_heard = self._loop.time()
        session.received += 1
        return session

    def _tell(self, identity: bytes, message: Message) -> None:
        """An answer to somebody without a session; lost when it cannot be sent."""
        with suppress(zmq.ZMQError):
            self.send(identity, self._codec.encode(message))

    def _told(self, answer: ServiceMessage) -> ServiceMessage:
        """Who comes over tcp sees numbers of the others, no names."""
        return answer.for_strangers() if isinstance(answer, Live) and ipc_path(self._endpoint) is None else answer

    def _submit(self, message: Submit, session: _Session) -> None:
        size = len(message.tokens) + sum(map(len, message.outputs))
        try:
            session.allowance.request(size, len(session.open))
        except Overloaded as error:
            self._service.note_refused(message, error)
            session.post(refusal(message.id, error))
            return
        try:
            self._service.submit(message, session)
            if message.id in session.open:
                session.allowance.opened(message.id, size)
        except Exception as error:  # one client's request must not reach the others, whatever it did
            if not isinstance(error, TreadleError):
                logger.exception("a request raised")
            session.post(refusal(message.id, error))

    async def _do(self, message: ControlMessage, session: _Session) -> None:
        what = type(message).__name__.lower()
        try:
            if self._control is None or ipc_path(self._endpoint) is None:
                raise InvalidRequest(f"{what} is not for clients of {self._endpoint}: ask on the server's own machine")
            session.post(Done(message.id, await self._control(message)))
        except Exception as error:
            if not isinstance(error, TreadleError):
                logger.exception("%s raised", what)
            session.post(refusal(message.id, error))

    async def _record(self, message: Record, session: _Session) -> None:
        """It shows what other clients do, if not what they say: for whoever may drain the server, too."""
        try:
            if ipc_path(self._endpoint) is None:
                raise InvalidRequest(f"record is not for clients of {self._endpoint}: ask on the server's own machine")
            session.post(msgspec.structs.replace(await self._service.record(message.seconds), id=message.id))
        except Exception as error:
            if not isinstance(error, TreadleError):
                logger.exception("record raised")
            session.post(refusal(message.id, error))

    def _retry(self) -> None:
        for session in list(self._sessions.values()):
            session.drain()

    def _arm(self) -> None:
        if self._sweeper is None and self._sessions and not self._private:
            self._sweep_due = self._loop.time() + _SWEEP_SECONDS
            self._sweeper = self._loop.call_at(self._sweep_due, self._sweep)

    def _sweep(self) -> None:
        """Ends the sessions that have been silent: clients ping while they are open."""
        self._sweeper = None
        now = self._loop.time()
        late = now - self._sweep_due
        if late > _SWEEP_SECONDS:  # we stood still, stopped perhaps: what the clients said meanwhile is not read yet
            for session in self._sessions.values():
                session.last_heard += late
        oldest = now - _SILENCE_SECONDS
        for session in [s for s in self._sessions.values() if s.last_heard < oldest]:
            self.drop(session, f"was silent for {_SILENCE_SECONDS:g} s")
        self._arm()


class _Session(Sink):
    """One client. What its socket does not take waits here, up to a bound."""

    def __init__(self, server: ClientServer, identity: bytes, number: int, limits: ClientLimits) -> None:
        super().__init__(f"client-{number}")
        self.identity = identity
        self.number = number
        self._gone = False
        self.last_heard = 0.0
        self.received = 0
        self._deltas = 0
        self._server = server
        self.allowance = Allowance(limits)
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0

    def count_down(self, request_id: str) -> None:
        super().count_down(request_id)
        if request_id not in self.open:
            self.allowance.closed(request_id)

    def flush(self) -> None:
        self._deltas += 1
        self.post(self.take(self._deltas))

    def refuse(self, refused: Refused) -> None:
        self.post(refused)

    def post(self, message: Message) -> int:
        """Sends in order; cuts the client off when it is gone or too far behind. Returns the bytes of the message."""
        if self._gone:
            return 0
        frame = self._server.encode(message)
        self._backlog.append(frame)
        self._backlog_bytes += len(frame)
        if len(self._backlog) > 1 and self._backlog_bytes > self.allowance.limits.backlog_bytes:
            self._cut(f"does not read: {self._backlog_bytes} bytes wait for it")
        else:
            self.drain()
        return len(frame)

    def drain(self) -> None:
        try:
            while self._backlog and self._server.send(self.identity, self._backlog[0]):
                self._backlog_bytes -= len(self._backlog.popleft())
        except zmq.ZMQError:
            self._cut("is gone: its connection was lost")

    def mute(self) -> None:
        """Nothing is sent any more."""
        self._backlog.clear()
        self._backlog_bytes = 0
        self._gone = True

    def _cut(self, why: str) -> None:
        # Later, not now: this may be in the middle of a step's delivery, which must not change what it iterates over.
        self.mute()
        asyncio.get_running_loop().call_soon(self._server.drop, self, why)
