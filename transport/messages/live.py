"""What a service is doing now: rows, queue, ranks, events."""

from __future__ import annotations

import msgspec
from msgspec import field

from .base import Message
from .status import Health, Stats


class LiveRow(msgspec.Struct, array_like=True, frozen=True):
    """A continuation that runs (row ≥ 0) or waits (-1). Sizes in tokens, age in seconds since it was accepted.

    id: the first characters of its request's. state: "prefill", "decode", "waiting", "preempted". limit: of prompt and
    output together, where it ends at the latest.
    """

    id: str
    index: int
    tenant: str
    row: int
    state: str
    prompt: int
    computed: int
    output: int
    limit: int
    age: float


class LiveLatency(msgspec.Struct, array_like=True, frozen=True):
    """Percentiles over `count` values of the last minute, in seconds; all are 0 where there was none."""

    count: int = 0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0


class LiveRank(msgspec.Struct, array_like=True, frozen=True):
    """One engine rank. pid: 0 where it is not told. step: the last that it answered, -1 for none; step_ms: time in it.

    state: "ready", "busy" (a step is with it), "late" (for more than half of the step's time), "lost", "restarting",
    "starting". step_age: seconds that the step with it has run.
    """

    rank: int
    pid: int
    state: str
    step: int
    step_age: float
    step_ms: float


class LiveEvent(msgspec.Struct, array_like=True, frozen=True):
    """Something that happened `ago` seconds ago, the last of `count` times. detail: for the server's own machine."""

    ago: float
    kind: str
    text: str
    detail: str = ""
    count: int = 1


class Live(Message, frozen=True, kw_only=True):
    """What the service is doing now, for people who look. Ids and numbers: nobody's prompt, token or parameter.

    now: the service's clock in seconds, for rates between two of these of one incarnation. max_rows: that can run.
    rows, queue: bounded; stats has the whole counts. ttft: from acceptance to the first token. tpot: of a
    continuation that has ended, the mean between its tokens after the first. wait: from acceptance to the first step.
    blocks: a picture of the KV cache, one byte for each `blocks_per_cell` blocks in order: the high half is the share
    that running requests own, the low half the share that is cached, in fifteenths, rounded up.
    """

    id: str = ""
    incarnation: str
    model: str
    now: float
    max_rows: int
    stats: Stats
    health: Health
    rows: list[LiveRow] = field(default_factory=list)
    queue: list[LiveRow] = field(default_factory=list)
    ttft: LiveLatency = LiveLatency()
    tpot: LiveLatency = LiveLatency()
    wait: LiveLatency = LiveLatency()
    blocks: bytes = b""
    blocks_per_cell: int = 1
    ranks: list[LiveRank] = field(default_factory=list)
    events: list[LiveEvent] = field(default_factory=list)

    def for_strangers(self) -> Live:
        """Without what is nobody's business beyond the server's machine: ids, tenants, pids, details of errors."""
        plain = msgspec.structs.replace
        return plain(
            self,
            rows=[plain(row, id="", tenant="") for row in self.rows],
            queue=[plain(row, id="", tenant="") for row in self.queue],
            ranks=[plain(rank, pid=0) for rank in self.ranks],
            events=[plain(event, detail="") for event in self.events],
        )
