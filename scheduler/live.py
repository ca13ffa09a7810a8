"""What the service does now, for people who look: rows, queue, latencies, ranks, a picture of the cache, events.

Nothing is computed until somebody asks, and not oftener than five times a second, whoever asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from treadle.errors import TreadleError
from treadle.kvcache import picture
from treadle.transport.messages import Health, Live, LiveEvent, LiveRank, LiveRow, Stats, StepPlan

from .core import Core
from .latencies import Latencies
from .lifecycle import GroupLost, GroupReady, ServiceEvent
from .pipeline import Pipeline
from .recording import RecordedCore
from .request import NO_ROW, Output, Sequence
from .rows import Rows

_MOST_ROWS = 256
_MOST_QUEUE = 32
_MOST_EVENTS = 64
_EVENTS_TOLD = 32
_ID_CHARACTERS = 8
_NAME_CHARACTERS = 32
_TEXT_CHARACTERS = 240
_SAME_SECONDS = 10.0
_FRESH_SECONDS = 0.2


@dataclass(slots=True)
class _Event:
    at: float
    kind: str
    text: str
    detail: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Sights:
    """What there is to look at. core: None before the engines are ready. pids: of the group that serves, by rank."""

    incarnation: str
    model: str
    max_rows: int
    ranks: int
    stats: Stats
    health: Health
    core: Core | RecordedCore | None
    pipeline: Pipeline
    pids: list[int]


class LiveDesk:
    """Keeps what has to be noted when it happens; the rest is looked at when somebody asks. Times are the loop's."""

    def __init__(self) -> None:
        self._latencies = Latencies()
        self._events: deque[_Event] = deque(maxlen=_MOST_EVENTS)
        self._last: Live | None = None

    # ── what happens ──

    def planned(self, core: Core | RecordedCore, plan: StepPlan, now: float) -> None:
        if plan.start:
            owner = core.running.rows.owner
            self._latencies.started([owner[start.row] for start in plan.start], now)

    def applied(self, core: Core | RecordedCore, now: float) -> None:
        self._latencies.applied(core.running.rows, now)

    def ended(self, output: Output, now: float) -> None:
        self._latencies.ended(output, now)

    def event(self, event: ServiceEvent, now: float) -> None:
        """An engine group was lost, or serves, or none will."""
        self.note(*_in_words(event), now)

    def refused(self, error: TreadleError, now: float) -> None:
        """A request was not accepted."""
        self.note("refused", error.code, "", now)

    def note(self, kind: str, text: str, detail: str, now: float) -> None:
        """Many of a kind become one: a flood of refusals leaves the others in sight."""
        for event in list(self._events)[-4:]:
            if (event.kind, event.text) == (kind, text) and now - event.at < _SAME_SECONDS:
                event.at, event.count, event.detail = now, event.count + 1, detail[:_TEXT_CHARACTERS]
                return
        self._events.append(_Event(now, kind, text[:_TEXT_CHARACTERS], detail[:_TEXT_CHARACTERS]))

    # ── what is told ──

    def look(self, see: Callable[[], Sights], now: float) -> Live:
        """The picture of this moment, or of one less than 0.2 s ago."""
        if self._last is None or now - self._last.now >= _FRESH_SECONDS:
            self._last = self._draw(see(), now)
        return self._last

    def _draw(self, sights: Sights, now: float) -> Live:
        core, latencies = sights.core, self._latencies
        rows, queue, (blocks, per_cell) = list[LiveRow](), list[LiveRow](), (b"", 1)
        if core is not None:
            running, waiting = core.running, core.waiting
            rows = [running_row(sequence, running.rows, now) for sequence in running.sequences()[:_MOST_ROWS]]
            queue = [waiting_row(sequence, now) for sequence in waiting.earliest(_MOST_QUEUE)]
            blocks, per_cell = picture(running.cache.pool)
        return Live(
            incarnation=sights.incarnation,
            model=sights.model,
            now=now,
            max_rows=sights.max_rows,
            stats=sights.stats,
            health=sights.health,
            rows=rows,
            queue=queue,
            ttft=latencies.ttft.percentiles(now),
            tpot=latencies.tpot.percentiles(now),
            wait=latencies.wait.percentiles(now),
            blocks=blocks,
            blocks_per_cell=per_cell,
            ranks=[_rank(rank, sights, now) for rank in range(sights.ranks)],
            events=[
                LiveEvent(now - event.at, event.kind, event.text, event.detail, event.count)
                for event in list(self._events)[-_EVENTS_TOLD:]
            ],
        )


def running_row(sequence: Sequence, rows: Rows, now: float) -> LiveRow:
    row = sequence.row
    known, computed = int(rows.known[row]), int(rows.computed[row])
    written = known - sequence.request.prompt_len
    # A row that decodes has at most its newest token to compute; planned steps may be ahead of what is known.
    state = "decode" if written > 0 and known - computed <= 1 else "prefill"
    return _row(sequence, row, state, min(computed, known), written, now)


def waiting_row(sequence: Sequence, now: float) -> LiveRow:
    state = "preempted" if sequence.admission else "waiting"
    return _row(sequence, NO_ROW, state, 0, sequence.known - sequence.request.prompt_len, now)


def _row(sequence: Sequence, row: int, state: str, computed: int, written: int, now: float) -> LiveRow:
    request = sequence.request
    name = request.id.rpartition("/")[2][:_ID_CHARACTERS]
    return LiveRow(
        name,
        sequence.index,
        request.tenant[:_NAME_CHARACTERS],
        row,
        state,
        request.prompt_len,
        computed,
        written,
        request.limit,
        now - sequence.ticket.arrival,
    )


def _rank(rank: int, sights: Sights, now: float) -> LiveRank:
    pipeline, health = sights.pipeline, sights.health
    oldest = pipeline.oldest
    last = next((step for step in reversed(pipeline.recent) if rank in step.results), None)
    pid = sights.pids[rank] if rank < len(sights.pids) else 0
    waits = oldest is not None and rank not in oldest.results
    age = now - oldest.began_at if oldest is not None and waits else 0.0
    if health.state in ("starting", "closed"):
        state = health.state
    elif health.state in ("degraded", "failed"):
        state = "lost" if rank == health.rank or health.state == "failed" else "restarting"
    elif oldest is not None and waits:
        state = "late" if oldest.late else "busy"
    else:
        state = "ready"
    if last is None:
        return LiveRank(rank, pid, state, -1, age, 0.0)
    return LiveRank(rank, pid, state, last.number, age, last.results[rank].elapsed_us / 1000)


def _in_words(event: ServiceEvent) -> tuple[str, str, str]:
    """(kind, text, detail). Only the detail may have paths and messages of others in it."""
    if isinstance(event, GroupLost):
        what = "engine group" if event.serving else "spare engine group"
        at = f"at step {event.step}" if event.step >= 0 else "between steps"
        return "lost", f"{what} {event.group}: rank {event.rank}, {at}: {event.cause}", event.detail
    if isinstance(event, GroupReady):
        how = ", which stood by," if event.spare else ""
        return "ready", f"engine group {event.group}{how} serves after {event.seconds:.2f} s", ""
    return "gave up", f"after {event.attempts} restarts", event.detail
