"""Requests of a journal, which run on without a reader until their client comes back for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from treadle.transport.codec import unpack
from treadle.transport.messages import Delta, Submit

from .delivery import Route, Sink
from .request import Request


@dataclass(slots=True)
class _Orphan:
    request: Request
    tokens: list[list[int]]
    ends: dict[int, Delta] = field(default_factory=dict)


class Orphans(Sink):
    """A sink that keeps what it gets, by the key that the client gave its request."""

    def __init__(self) -> None:
        super().__init__("journal")
        self._kept: dict[str, _Orphan] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, submit: Submit, request: Request, number: int) -> None:
        request.context = Route(self, submit.key, number)
        self.open[submit.key] = request.unfinished
        self._kept[submit.key] = _Orphan(request, [unpack(output).tolist() for output in submit.outputs])

    def flush(self) -> None:
        for delta in self.take().each():
            orphan = self._kept.get(delta.id)
            if orphan is not None:
                orphan.tokens[delta.index] += delta.tokens
                if delta.finish:
                    orphan.ends[delta.index] = delta

    def claim(self, message: Submit, sink: Sink) -> Request | None:
        """The client of `message` is back: the request is its own again, and it gets what it does not have yet.

        None when there is no such request, or when it cannot go on from what the client has: with log-probabilities,
        which are not kept, or where the journal is behind. It is forgotten in any case.
        """
        orphan = self._kept.pop(message.key, None)
        if orphan is None:
            return None
        had = [unpack(output).tolist() for output in message.outputs] or [[] for _ in orphan.tokens]
        details = message.params.logprobs is not None or message.params.prompt_logprobs is not None
        behind = any(tokens[: len(have)] != have for tokens, have in zip(orphan.tokens, had, strict=True))
        if details or behind or message.params != orphan.request.params:
            return None
        route = orphan.request.context
        old = route if isinstance(route, Route) else Route(sink, message.id)
        orphan.request.context = replace(old, sink=sink, request_id=message.id)
        self.open.pop(message.key, None)
        if orphan.request.unfinished:
            sink.open[message.id] = orphan.request.unfinished
        for index, tokens in enumerate(orphan.tokens):
            end = orphan.ends.get(index)
            new = tokens[len(had[index]) :]
            if end is not None:
                sink.put(
                    Delta(message.id, index, new, end.finish, end.stop_token, 0, [], [], end.error_code, end.error)
                )
            elif new:
                sink.put(Delta(message.id, index, new))
        sink.flush()
        return orphan.request

    def keys(self) -> list[str]:
        return list(self._kept)

    def drop(self, key: str) -> None:
        self._kept.pop(key, None)
