"""A real rank that can be told to go wrong: SIGUSR2 spoils the next message that it sends, in a way drawn at random.

Only for scripts/chaos.py, which starts it in place of `python -m treadle.engine`; the product has no such switch.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import treadle.engine.__main__ as rank_program
from treadle.transport.codec import engine_codec
from treadle.transport.messages import StepResult
from treadle.transport.sockets import rank_socket

WAYS = ("garbage", "digest", "step", "tokens", "raise", "memory", "silence")


class SpoilingSocket:
    """A socket whose next message is spoiled after `order`."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._ordered = False

    def order(self, *_: object) -> None:
        self._ordered = True

    def send(self, frame: bytes) -> None:
        spoiled: bytes | None = frame
        if self._ordered:
            message = engine_codec().decode(frame)
            if isinstance(message, StepResult):
                self._ordered = False
                spoiled = _spoil(message, frame)
        if spoiled is not None:
            self._socket.send(spoiled)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _spoil(result: StepResult, frame: bytes) -> bytes | None:
    way = random.SystemRandom().choice(WAYS)
    print(f"chaos: {way}", file=sys.stderr, flush=True)
    change = msgspec.structs.replace
    encode = msgspec.msgpack.encode
    if way == "raise":
        raise RuntimeError("chaos: something broke")
    if way == "memory":
        raise MemoryError("chaos: no memory")
    if way == "silence":
        return None
    if way == "garbage":
        return frame[: len(frame) // 2] + b"\xc1\xc1"
    if way == "digest":
        return encode(change(result, digest=result.digest ^ 1))
    if way == "step":
        return encode(change(result, step=result.step + 100))
    return encode(change(result, tokens=result.tokens + b"\1\0\0\0"))


def _socket(context: zmq.Context[zmq.Socket[bytes]], rank: int) -> Any:
    socket = SpoilingSocket(rank_socket(context, rank))
    signal.signal(signal.SIGUSR2, socket.order)
    return socket


if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # until the socket is there
    rank_program.rank_socket = _socket  # type: ignore[assignment]
    code = rank_program.main()
    sys.stdout.flush()
    sys.stderr.flush()
    zmq.Context.instance().destroy(linger=2_000)
    os._exit(code)
