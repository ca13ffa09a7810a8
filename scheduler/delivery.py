"""Whoever receives deltas: a client behind a socket, or an event loop of this program."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.errors import Overloaded, ServiceError, TreadleError
from treadle.transport.messages import Delta, Refused


class Sink:
    """Base of receivers. `name` is unique in a service: request ids only need to be unique within their sink.

    The service calls `put` for each delta and `flush` once for every sink that got some, after each step.
    `open` counts the unfinished continuations by request id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: dict[str, int] = {}
        self.pending: list[Delta] = []

    def put(self, delta: Delta) -> None:
        self.pending.append(delta)

    def flush(self) -> None:
        """Sends what is pending on its way. Must not block and must not raise."""
        raise NotImplementedError

    def count_down(self, request_id: str) -> None:
        """One continuation of the request has ended."""
        left = self.open.get(request_id, 0) - 1
        if left > 0:
            self.open[request_id] = left
        else:
            self.open.pop(request_id, None)

    def take(self) -> list[Delta]:
        items, self.pending = self.pending, []
        return items


@dataclass(frozen=True, slots=True)
class Route:
    """Where the deltas of a request go; travels with it as `Request.context`. number: in the journal, -1 for none."""

    sink: Sink
    request_id: str
    number: int = -1


def refusal(request_id: str, error: Exception) -> Refused:
    """What a caller is told when its message raised `error`. An error that is not ours is our fault, and no secret."""
    if not isinstance(error, TreadleError):
        return Refused(request_id, ServiceError.code, f"internal error: {type(error).__name__}: {error}")
    retry_after = error.retry_after if isinstance(error, Overloaded) else 0.0
    return Refused(request_id, error.code, str(error), retry_after)
