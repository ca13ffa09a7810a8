"""Everybody who looks at the live page: one poller for all of them, which runs only while somebody looks."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import msgspec

from treadle.errors import TreadleError
from treadle.live_rates import Rates, rates
from treadle.transport.messages import Live, LiveLatency, LiveRow

from .errors import ApiError
from .link import Link
from .streaming import named_event

MOST_VIEWERS = 32
_EVERY_SECONDS = 1.0
_PATIENCE_SECONDS = 2.0
_HISTORY = 180
Sample = tuple[float | None, ...]


class Viewer:
    """One stream. Only the newest event waits for it: who reads slowly sees fewer, and nothing piles up.

    first: what it gets before everything else.
    """

    def __init__(self, first: bytes) -> None:
        self._first = first
        self._pending = b""
        self._news = asyncio.Event()
        self._ended = False
        if first:
            self._news.set()

    def put(self, event: bytes) -> None:
        self._pending = event
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def next(self) -> bytes:
        """What is new; nothing when the stream is to end."""
        await self._news.wait()
        self._news.clear()
        event, self._first, self._pending = self._first + self._pending, b"", b""
        return b"" if self._ended else event


class Viewers:
    """model_names: as the gateway's settings have them; none: as the service calls its model."""

    def __init__(self, link: Link, model_names: list[str]) -> None:
        self._link = link
        self._model_names = model_names
        self._viewers: set[Viewer] = set()
        self._poller: asyncio.Task[None] | None = None
        self._before: Live | None = None
        self._history: deque[Sample] = deque(maxlen=_HISTORY)
        self._closed = False

    def __len__(self) -> int:
        return len(self._viewers)

    @property
    def polls(self) -> bool:
        return self._poller is not None

    def enter(self) -> Viewer:
        """Raises ApiError: 429 when there are as many as there may be, 503 when the gateway ends."""
        if self._closed:
            raise ApiError(503, "the gateway is closing", type="service_unavailable", retry_after=1)
        if len(self._viewers) >= MOST_VIEWERS:
            raise ApiError(
                429, f"{MOST_VIEWERS} people look already, which is the limit", type="rate_limit_error", retry_after=5
            )
        viewer = Viewer(self._past())
        self._viewers.add(viewer)
        if self._poller is None:
            self._poller = asyncio.get_running_loop().create_task(self._poll(), name="treadle-live")
        return viewer

    def leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)
        if not self._viewers and self._poller is not None:
            self._poller.cancel()
            self._poller = None
            self._before = None
            self._history.clear()

    def close(self) -> None:
        """Ends every stream."""
        self._closed = True
        for viewer in self._viewers:
            viewer.end()

    async def _poll(self) -> None:
        while True:
            event = await self._look()
            for viewer in self._viewers:
                viewer.put(event)
            await asyncio.sleep(_EVERY_SECONDS)

    async def _look(self) -> bytes:
        try:
            served = self._link.served
            async with asyncio.timeout(_PATIENCE_SECONDS):
                live = await served.frontend.live()
        except TimeoutError:
            return named_event("lost", {"detail": f"no answer within {_PATIENCE_SECONDS:g} s"})
        except TreadleError as error:
            return named_event("lost", {"detail": str(error)})
        if self._before is not None and self._before.incarnation != live.incarnation:
            self._history.clear()
        speed, self._before = rates(self._before, live), live
        sample = sample_of(live, speed)
        self._history.append(sample)
        name = self._model_names[0] if self._model_names else live.model
        return named_event("live", page_data(live, name, speed, sample))

    def _past(self) -> bytes:
        """What was seen before somebody came, without the newest, which comes again."""
        if self._before is None:
            return b""
        return named_event("history", {"incarnation": self._before.incarnation, "samples": list(self._history)})


def sample_of(live: Live, speed: Rates | None) -> Sample:
    """A point of each chart: time, tokens a second out and in, percentiles of first tokens and of those after."""
    flow = (None, None) if speed is None else (speed.generated, speed.prompt)
    return (live.now, *flow, *_points(live.ttft), *_points(live.tpot))


def _points(found: LiveLatency) -> Sample:
    return (found.p50, found.p90, found.p99) if found.count else (None, None, None)


def page_data(live: Live, model: str, speed: Rates | None, sample: Sample) -> dict[str, Any]:
    """What the page is told: what strangers may know, since whoever has a key is no owner of the others' names."""
    told, plain = live.for_strangers(), msgspec.structs.asdict
    return {
        "model": model,
        "incarnation": told.incarnation,
        "max_rows": told.max_rows,
        "stats": _without_id(plain(told.stats)),
        "hit_rate": told.stats.hit_rate,
        "health": _without_id(plain(told.health)),
        "rates": speed,
        "sample": sample,
        "rows": [_row(row) for row in told.rows],
        "queue": [_row(row) for row in told.queue],
        "ttft": plain(told.ttft),
        "tpot": plain(told.tpot),
        "wait": plain(told.wait),
        "blocks": told.blocks,
        "blocks_per_cell": told.blocks_per_cell,
        "ranks": [{name: value for name, value in plain(rank).items() if name != "pid"} for rank in told.ranks],
        "events": [{name: value for name, value in plain(event).items() if name != "detail"} for event in told.events],
    }


def _row(row: LiveRow) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(row).items() if name not in ("id", "tenant")}


def _without_id(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "id"}
