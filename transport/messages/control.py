"""What a client says to a service beside its requests, and signs of life."""

from __future__ import annotations

from .base import Message


class InfoRequest(Message, frozen=True):
    """kind: "server", "tokenizer", "stats", "metrics", "health" or "live"; answered by the message of that name."""

    id: str
    kind: str


class Drain(Message, frozen=True):
    """Client → service, over ipc only: finish within `grace` seconds, take nothing new, end. Answered by Done."""

    id: str
    grace: float


class Reload(Message, frozen=True):
    """Client → service, over ipc only: go on with the weights of `model`, of the same shape. Answered by Done."""

    id: str
    model: str


class Record(Message, frozen=True):
    """Client → service, over ipc only: record what happens for some seconds. Answered by Timeline."""

    id: str
    seconds: float


class Done(Message, frozen=True):
    id: str
    detail: str = ""


class Ping(Message, frozen=True):
    """Client → service: I live, do you? nonce: how many messages the client has sent, this one included.

    Scheduler → rank: nothing; that it can be sent is what it tells.
    """

    nonce: int


class Pong(Message, frozen=True):
    """incarnation: of the server and of this client's session in it; another one means that requests are gone.

    received: messages in this session. Where `nonce - received` changes within a session, some were lost on the way.
    """

    nonce: int
    incarnation: str
    received: int = 0
