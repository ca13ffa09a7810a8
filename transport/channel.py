"""One ZeroMQ socket on an asyncio event loop, without `zmq.asyncio`.

The loop watches the socket's file descriptor with `add_reader`. ZeroMQ signals that descriptor edge-triggered and for
reading and writing alike (zmq_getsockopt(3), ZMQ_FD): after an event, and after every send, whatever is ready must be
drained until `Again`, or the next edge never comes. That rule lives here and nowhere else. After sends it is kept once
in the loop's next turn, however many they were: a step is sent to many clients.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

_FRAMES_PER_TURN = 256


class Channel:
    """Owns `socket` and closes it. `on_message(frames)` runs on the loop for every message, in order.

    `on_writable` runs when a send was refused before and may go through now. Must be made on the loop's thread.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        on_message: Callable[[list[bytes]], None],
        on_writable: Callable[[], None] | None = None,
    ) -> None:
        self._socket = socket
        self._on_message = on_message
        self._on_writable = on_writable
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._scheduled = False
        self._refused = False
        self._closed = False
        self._loop.add_reader(self._fd, self._drain)
        self._schedule()  # what arrived before the reader was added makes no further edge

    def send(self, frames: Sequence[bytes]) -> bool:
        """Queues one message; False when the peer's queue is full, in which case nothing was sent.

        Raises zmq.ZMQError, EHOSTUNREACH for example, where the socket's options ask for it.
        """
        if self._closed:
            return False
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self._refused = True
            return False
        finally:
            self._schedule()
        return True

    def close(self, linger_ms: int = 0) -> None:
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger_ms)

    def _events(self) -> int:
        return int(self._socket.getsockopt(zmq.EVENTS))

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._scheduled = False
        drained = False
        try:
            for _ in range(_FRAMES_PER_TURN):
                if self._closed:
                    return
                try:
                    frames = self._socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    drained = True
                    break
                self._on_message(frames)
        finally:
            # More than a turn's worth, or a handler that raised: let the loop breathe, then go on. Without this, what
            # is left would make no further edge.
            if not drained and not self._closed:
                self._schedule()
        if self._closed:
            return
        if self._refused and self._on_writable is not None and self._events() & zmq.POLLOUT:
            self._refused = False
            self._on_writable()
