"""A service behind a ZeroMQ endpoint: what `Client` uses."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import uuid
from dataclasses import dataclass
from typing import TypeAlias

import zmq

from treadle.errors import (
    InvalidRequest,
    Overloaded,
    ProtocolError,
    ServerLost,
    ServiceClosed,
    ServiceError,
    ServiceStarting,
    TreadleError,
    from_wire,
)
from treadle.transport.channel import Channel
from treadle.transport.codec import MAX_CLIENT_FRAME, client_codec
from treadle.transport.endpoints import ServerKeys, check_client, connect_client
from treadle.transport.messages import (
    Abort,
    ControlMessage,
    Deltas,
    Done,
    InfoRequest,
    Message,
    Ping,
    Pong,
    Record,
    Refused,
    ServiceMessage,
    Submit,
    Timeline,
)
from treadle.transport.sockets import client_socket

from .connecting import FirstHandshake, is_gone, probe
from .stream import Stream, StreamTable

logger = logging.getLogger("treadle")
_PING_SECONDS = 1.0
_DOUBT_SECONDS = 2.5
_STARTING_SECONDS = 0.1
_MORE_TIME = "; give it more with connect_timeout (--connect-timeout)"
Question: TypeAlias = InfoRequest | ControlMessage | Record


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question that is on its way, and who waits for its answer."""

    message: Question
    answer: asyncio.Future[ServiceMessage]

    def fail(self, error: TreadleError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class RemoteBackend:
    """Belongs to the loop that called `start`.

    libzmq reconnects by itself. What must not be guessed is told apart here: no answer to pings for `lost_after`
    seconds, silence and nobody who listens, an answer from another incarnation of the server, or messages that were
    lost on the way, ends the open streams with ServerLost. New requests then go to whoever answers.

    incarnation: of the server and of our session there, "" before it has said so.
    resume_timeout: with more than 0 seconds, open streams are kept so long instead, and sent again, with the tokens
    that they have, to whoever answers. The seed is then the client's, so the tokens are those of one undisturbed run.
    """

    def __init__(
        self,
        endpoint: str,
        server_key: str | None,
        connect_timeout: float,
        lost_after: float,
        resume_timeout: float = 0.0,
        keys: ServerKeys | None = None,
    ) -> None:
        self._keys = keys
        self._resume_timeout = resume_timeout
        self._sent = 0
        self._unreceived: int | None = 0  # the first session gets all that is sent, from the beginning on
        self._deltas = 0
        self._endpoint = endpoint
        self._server_key = server_key
        self._connect_timeout = connect_timeout
        self._lost_after = lost_after
        self._codec = client_codec()
        self._streams = StreamTable()
        self._asked: dict[str, _Asked] = {}
        self._channel: Channel | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self.incarnation = ""
        self._full_since: float | None = None
        self._last_heard = self._ping_due = 0.0
        self._pinger: asyncio.TimerHandle | None = None
        self._doubt: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connects. Raises ConfigError, ServerLost when nobody is there, HandshakeFailed when it is somebody else."""
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        socket = client_socket(self._context, b"c" + os.urandom(15))
        try:
            await self._connect(socket)
        except BaseException:
            socket.close(0)
            raise
        self._channel = Channel(socket, self._receive)
        self._last_heard = self._ping_due = self._loop.time()
        self._ping()

    async def _connect(self, socket: zmq.Socket[bytes]) -> None:
        check_client(self._endpoint, self._server_key)  # before anybody is asked anything
        try:
            async with asyncio.timeout(self._connect_timeout):
                await probe(self._endpoint)
                handshake = FirstHandshake(socket, self._endpoint)
                try:
                    connect_client(socket, self._endpoint, self._server_key, self._keys)
                    await handshake.wait()
                finally:
                    handshake.close()
        except TimeoutError:
            raise ServerLost(f"{self._endpoint}: no answer within {self._connect_timeout:g} s{_MORE_TIME}") from None

    async def close(self) -> None:
        if self._pinger is not None:
            self._pinger.cancel()
        if self._doubt is not None:
            self._doubt.cancel()
        self._streams.fail_all(ServiceClosed("the client was closed"))
        self._fail_answers(ServiceClosed("the client was closed"))
        if self._channel is not None:
            self._channel.close(linger_ms=200)  # an abort that was just sent should arrive
            self._channel = None
        if self._context is not None:
            self._context.term()
            self._context = None

    def submit(self, message: Submit, stream: Stream) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise ServiceError("this client belongs to another event loop: make one Client per loop")
        if self._resume_timeout:
            message = stream.make_lasting(secrets.randbits(63))
        self._streams.add(stream)
        try:
            self._send(message)
        except TreadleError:
            self._streams.discard(message.id)
            raise

    def abort(self, message: Abort) -> None:
        if self._channel is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._send_abort, message)

    async def info(self, kind: str) -> ServiceMessage:
        """Raises ServerLost when nobody answers; a server that is still starting is asked again until then."""
        what = "no answer"
        try:
            async with asyncio.timeout(self._connect_timeout):
                while True:
                    try:
                        return await self._ask(InfoRequest(uuid.uuid4().hex, kind))
                    except ServiceStarting:
                        what = "it is starting, and not ready"
                    await asyncio.sleep(_STARTING_SECONDS)
        except TimeoutError:
            raise ServerLost(f"{self._endpoint}: {what} within {self._connect_timeout:g} s{_MORE_TIME}") from None

    async def control(self, message: ControlMessage) -> str:
        """Has the server drain or reload, and waits until it says how it went. Raises what it refuses with.

        Raises ServerLost when the server is restarted meanwhile or messages are lost: it may have been done, or not.
        """
        answer = await self._ask(message)
        return answer.detail if isinstance(answer, Done) else ""

    async def record(self, seconds: float) -> Timeline:
        """Raises what the server refuses with: only who reaches an ipc endpoint may ask."""
        answer = await self._ask(Record(uuid.uuid4().hex, seconds))
        if not isinstance(answer, Timeline):
            raise ProtocolError(f"{self._endpoint} answered {type(answer).__name__} to Record")
        return answer

    async def _ask(self, message: Question) -> ServiceMessage:
        asked = self._asked[message.id] = _Asked(message, self._loop.create_future())
        try:
            self._send(message)
            return await asked.answer
        finally:
            self._asked.pop(message.id, None)

    def _send_abort(self, message: Abort) -> None:
        if self._channel is not None:
            self._send(message)

    def _send(self, message: Message) -> None:
        if self._channel is None:
            raise ServiceClosed("the client is closed")
        frame = self._codec.encode(message)
        if len(frame) > MAX_CLIENT_FRAME:
            raise InvalidRequest(f"a request of {len(frame)} bytes: at most {MAX_CLIENT_FRAME} are allowed")
        if not self._channel.send([frame]):
            raise ServerLost(f"{self._endpoint}: nobody takes what is sent")
        self._sent += 1

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message = self._codec.decode(frames[0])
        except ProtocolError as error:
            logger.warning("%s sent what cannot be read: %s", self._endpoint, error)
            return
        self._last_heard = self._loop.time()
        if isinstance(message, Deltas):
            self._count(message.number)
            self._streams.receive(message)
        elif isinstance(message, Pong):
            self._full_since = None
            self._met(message.incarnation)
            self._compare(message.nonce - message.received)
        elif isinstance(message, Refused):
            self._refused(message)
        else:
            asked = self._asked.pop(message.id, None)
            if asked is not None and not asked.answer.done():
                asked.answer.set_result(message)

    def _refused(self, message: Refused) -> None:
        asked = self._asked.pop(message.id, None)
        if asked is not None:
            asked.fail(from_wire(message.code, message.message, message.retry_after))
        elif message.id:
            self._refuse(message)
        else:
            error = from_wire(message.code, f"{self._endpoint}: {message.message}", message.retry_after)
            if isinstance(error, Overloaded):
                self._full(error)
                return
            error = ProtocolError(f"{self._endpoint} could not read a message: {message.message}")
            self._streams.fail_all(error)
            self._fail_answers(error)  # it may have been any of them

    def _full(self, error: Overloaded) -> None:
        """The server has no room for one client more, which we are to it: it has dropped us, or is another.

        Streams that resume wait. Each ping asks again, and the first that is answered says that nothing of ours is
        there, as after a restart.
        """
        now = self._loop.time()
        if self._full_since is None:
            self._full_since = now
        if now - self._full_since >= self._resume_timeout:
            self._streams.fail_all(error)
        self._fail_answers(error)

    def _met(self, incarnation: str) -> None:
        if self.incarnation and incarnation != self.incarnation:
            self._unreceived = None
            self._lost("the server was restarted or had lost this client; open requests are gone")
        self.incarnation = incarnation

    def _count(self, number: int) -> None:
        """Deltas are numbered; a session begins with 1, and its Pong says the rest."""
        if number != 1 and number != self._deltas + 1:
            self._lost("messages of the server were lost on the way; open requests are gone")
        self._deltas = number

    def _compare(self, unreceived: int) -> None:
        if self._unreceived is not None and unreceived != self._unreceived:
            self._lost("messages to the server were lost on the way; open requests are gone")
        self._unreceived = unreceived

    def _lost(self, text: str) -> None:
        """The server does not know our open requests, or not all of them, nor what it was asked."""
        self._ask_again(text)
        if not self._resume_timeout:
            self._streams.fail_all(ServerLost(f"{self._endpoint}: {text}"))
            return
        streams = self._streams.open()
        if streams:
            logger.warning("%s: %s; %d are sent again", self._endpoint, text, len(streams))
        for stream in streams:
            self._resubmit(stream)

    def _ask_again(self, text: str) -> None:
        """What only reads is asked again. Whether the other was done is not known, and it may not be done twice."""
        for asked in list(self._asked.values()):
            try:
                if not isinstance(asked.message, InfoRequest):
                    raise ServerLost(f"{self._endpoint}: {text}; whether it was done is not known")
                self._send(asked.message)
            except TreadleError as error:
                asked.fail(error)

    def _resubmit(self, stream: Stream) -> None:
        if stream.ended or self._channel is None:
            return
        old = stream.wire_id
        self._streams.discard(old)
        message = stream.resubmission(uuid.uuid4().hex)
        self._streams.add(stream)
        try:
            self._send(Abort(old))  # whoever has it still should not go on
            self._send(message)
        except TreadleError as error:
            self._streams.discard(stream.wire_id)
            stream.fail(error)

    def _refuse(self, message: Refused) -> None:
        """A stream that resumes waits out a server that ends or is full: another answers, or this one later."""
        stream = self._streams.get(message.id)
        error = from_wire(message.code, message.message, message.retry_after)
        if stream is None or not self._resume_timeout:
            self._streams.refuse(message)
        elif isinstance(error, ServiceStarting):
            self._loop.call_later(_STARTING_SECONDS, self._resubmit, stream)
        elif isinstance(error, Overloaded) and stream.resumed:
            self._loop.call_later(error.retry_after, self._resubmit, stream)
        elif not isinstance(error, ServiceClosed):  # else the next incarnation will have it
            self._streams.refuse(message)

    def _ping(self) -> None:
        """Once a second while the client is open: tells the server that we live, and us whether it does."""
        if self._channel is None:
            return
        now = self._loop.time()
        late = now - self._ping_due
        if late > _PING_SECONDS:  # this loop was blocked: what the server said meanwhile has not been read yet
            self._last_heard += late
        if now - self._last_heard > _DOUBT_SECONDS and self._doubt is None:
            self._doubt = self._loop.create_task(self._look())
        patience = self._resume_timeout or self._lost_after
        if now - self._last_heard > patience:
            silent = ServerLost(f"{self._endpoint}: silent for {patience:g} s")
            self._streams.fail_all(silent)
            self._fail_answers(silent)  # a drain or a reload has no time of its own
        if self._channel.send([self._codec.encode(Ping(self._sent + 1))]):
            self._sent += 1
        self._ping_due = self._loop.time() + _PING_SECONDS
        self._pinger = self._loop.call_later(_PING_SECONDS, self._ping)

    async def _look(self) -> None:
        """The server is silent. Where nobody listens any more, there is nothing to wait for."""
        try:
            async with asyncio.timeout(_DOUBT_SECONDS):
                gone = await is_gone(self._endpoint)
        except TimeoutError:
            gone = False
        self._doubt = None
        if gone:
            error = ServerLost(f"{self._endpoint}: the server has ended; open requests are gone")
            if not self._resume_timeout:
                self._streams.fail_all(error)
            self._fail_answers(error)

    def _fail_answers(self, error: TreadleError) -> None:
        for asked in self._asked.values():
            asked.fail(error)
        self._asked.clear()
