"""What the public classes need of a service, wherever it runs."""

from __future__ import annotations

from typing import Protocol

from treadle.transport.messages import Abort, ServiceMessage, Submit, Timeline

from .stream import Stream


class Backend(Protocol):
    """Implemented by `EmbeddedBackend` (a thread of this process) and `RemoteBackend` (a ZeroMQ client)."""

    def submit(self, message: Submit, stream: Stream) -> None:
        """Sends a request; deltas and errors reach `stream` on the loop that calls this."""

    def abort(self, message: Abort) -> None:
        """From any thread."""

    async def info(self, kind: str) -> ServiceMessage:
        """ "server", "tokenizer", "stats", "metrics" or "health". Raises ServiceError."""

    async def record(self, seconds: float) -> Timeline:
        """What the service does in the next seconds."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...
