"""What a step brought, on its way to readers: into the journal first, then to the observers and the sinks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Items

from .delivery import Sink, delta, put_tokens, route_of
from .keeping import Keeping
from .observers import Observers
from .request import Output, Outputs, Sequence


class Outbox:
    """keeping: where there is a journal. ended: told of each continuation that has. idle: after each delivery."""

    def __init__(self, observers: Observers, ended: Callable[[Sequence], None], idle: Callable[[], None]) -> None:
        self.keeping: Keeping | None = None
        self._observers = observers
        self._ended = ended
        self._idle = idle

    def deliver_step(self, outputs: Outputs) -> None:
        if self.keeping is not None:
            self.keeping.note_step(outputs)
        self.deliver(outputs.others, put_tokens(outputs))

    def deliver(self, outputs: Items[Output], dirty: dict[Sink, None] | None = None) -> None:
        """dirty: sinks that wait for `flush` already."""
        dirty = {} if dirty is None else dirty
        if self.keeping is not None:
            self.keeping.note(outputs)
        for output in outputs:
            route = route_of(output.sequence)
            route.sink.put(delta(output, route.request_id))
            dirty[route.sink] = None
            if output.finish:
                self._observers.ended(output, asyncio.get_running_loop().time())
                route.sink.count_down(route.request_id)
                self._ended(output.sequence)
        for sink in dirty:
            sink.flush()
        self._idle()
