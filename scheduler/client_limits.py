"""What one client may have at a time, so that a greedy or broken one costs the others nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

from treadle.errors import ConfigError, Overloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """requests, prompt_bytes: open at a time. messages_per_second: sustained; twice as many may come at once.

    backlog_bytes: that wait for a client which does not read; over it the client is cut off. Raises ConfigError.
    """

    requests: int = 4096
    prompt_bytes: int = 64 << 20
    messages_per_second: float = 10_000.0
    backlog_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        for name in ("requests", "prompt_bytes", "messages_per_second", "backlog_bytes"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"client limit {name}={getattr(self, name)!r}: it must be at least 1")


@dataclass(slots=True)
class Allowance:
    """One client's use of its limits. Time is a parameter, in seconds."""

    limits: ClientLimits
    _left: float = -1.0
    _at: float = 0.0
    _bytes: dict[str, int] = field(default_factory=dict)
    _total: int = 0

    def message(self, now: float) -> None:
        """A message has come. Raises Overloaded when there are more of them than may be (a token bucket)."""
        rate, most = self.limits.messages_per_second, 2 * self.limits.messages_per_second
        self._left = most if self._left < 0 else min(most, self._left + (now - self._at) * rate)
        self._at = now
        if self._left < 1.0:
            raise Overloaded(
                f"more than {rate:g} messages a second from this client", (1.0 - self._left) / rate, "client"
            )
        self._left -= 1.0

    def request(self, size: int, open_requests: int) -> None:
        """A request with a prompt of `size` bytes would be opened. Raises Overloaded; `opened` enters it."""
        if open_requests >= self.limits.requests:
            raise Overloaded(f"this client has {open_requests} requests open, which is the limit", bound="client")
        if self._total and self._total + size > self.limits.prompt_bytes:
            most = self.limits.prompt_bytes
            message = f"this client's open prompts have {self._total} bytes; {most} are allowed"
            raise Overloaded(message, bound="client")

    def opened(self, request_id: str, size: int) -> None:
        self._bytes[request_id] = size
        self._total += size

    def closed(self, request_id: str) -> None:
        self._total -= self._bytes.pop(request_id, 0)
