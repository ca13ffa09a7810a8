"""Whoever receives deltas: a client behind a socket, or an event loop of this program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from treadle.errors import Overloaded, ServiceError, TreadleError
from treadle.transport.messages import Delta, Deltas, Refused

from .request import Output, Outputs, Sequence
from .request_trace import RequestTrace


class Sink:
    """Base of receivers. `name` is unique in a service: request ids only need to be unique within their sink.

    After each step the service calls `put_token` or `put` once for each continuation that got something, and `flush`
    once for every sink that did: `flush` sends what `take` gives. `open` counts the unfinished continuations by request
    id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: dict[str, int] = {}
        self._items: list[Delta] = []
        self._tokens: dict[str, int] = {}

    def put_token(self, request_id: str, token: int) -> None:
        """The short form of `put(Delta(request_id, 0, [token]))`: this is the bulk, so it makes no objects."""
        self._tokens[request_id] = token

    def put(self, delta: Delta) -> None:
        self._items.append(delta)

    def flush(self) -> None:
        """Sends what is pending on its way. Must not block and must not raise."""
        raise NotImplementedError

    def refuse(self, refused: Refused) -> None:
        """A request that was taken in is not accepted after all. Must not block and must not raise."""
        raise NotImplementedError

    def count_down(self, request_id: str) -> None:
        """One continuation of the request has ended."""
        left = self.open.get(request_id, 0) - 1
        if left > 0:
            self.open[request_id] = left
        else:
            self.open.pop(request_id, None)

    def forget(self, request_id: str) -> int:
        """Ends what is left of the request's continuations; returns how many."""
        left = self.open.get(request_id, 0)
        for _ in range(left):
            self.count_down(request_id)
        return left

    def take(self, number: int = 0) -> Deltas:
        deltas = Deltas(self._items, self._tokens, number)
        self._items, self._tokens = [], {}
        return deltas


@dataclass(frozen=True, slots=True)
class Route:
    """Where the deltas of a request go; travels with it as `Request.context`. number: in the journal, -1 for none.

    arrived: by `time.perf_counter`; 0 for one that arrived before this service did. trace: kept for whoever traces it.
    """

    sink: Sink
    request_id: str
    number: int = -1
    arrived: float = 0.0
    trace: RequestTrace | None = None


def route_of(sequence: Sequence) -> Route:
    return cast(Route, sequence.request.context)  # the service put it there


def delta(output: Output, request_id: str) -> Delta:
    """What a step brought to one sequence, as its reader gets it."""
    return Delta(
        request_id,
        output.sequence.index,
        output.tokens,
        output.finish,
        output.stop_token,
        output.cached_tokens,
        output.logprobs,
        output.prompt_logprobs,
        output.error_code,
        output.error,
    )


def put_tokens(outputs: Outputs) -> dict[Sink, None]:
    """Gives each sequence that goes on its token. Returns the sinks that wait for `flush`, in order."""
    dirty: dict[Sink, None] = {}
    for sequence, token in zip(outputs.sequences, outputs.tokens, strict=True):
        route = route_of(sequence)
        sink = route.sink
        if sequence.index:
            sink.put(Delta(route.request_id, sequence.index, [token]))
        else:
            sink.put_token(route.request_id, token)
        dirty[sink] = None
    return dirty


def refusal(request_id: str, error: Exception) -> Refused:
    """What a caller is told when its message raised `error`. An error that is not ours is our fault, and no secret."""
    if not isinstance(error, TreadleError):
        return Refused(request_id, ServiceError.code, f"internal error: {type(error).__name__}: {error}")
    retry_after = error.retry_after if isinstance(error, Overloaded) else 0.0
    return Refused(request_id, error.code, str(error), retry_after)
