"""Everybody who watches a service work and changes nothing: counts, traces, the live view, a recording.

The service tells each event here once, in the order of a step's walk; who wants to know of it stands below.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Items
from time import perf_counter

from treadle.errors import InvalidRequest, Overloaded, TreadleError
from treadle.transport.messages import ServiceMetrics, StepPlan, Submit, TenantFigures, Timeline

from .core import Core
from .lifecycle import ServiceEvent
from .live import LiveDesk
from .recording import RecordedCore
from .request import Output, Request, Sequence
from .request_trace import RequestTrace, begin_trace
from .step import Step
from .telemetry import Telemetry
from .timeline import MOST_SECONDS, Recorder
from .tracing.exporter import TraceExporter
from .tracing.start import start_tracing


class Observers:
    """`now` is the loop's time; what is measured within a step is measured here, by `time.perf_counter`.

    recorder: None while nobody records.
    """

    def __init__(self) -> None:
        self.telemetry = Telemetry()
        self.live = LiveDesk()
        self.recorder: Recorder | None = None
        self._traces: TraceExporter | None = None

    def start(self, traces_endpoint: str, model: str) -> None:
        """Raises ConfigError for an endpoint that cannot be used."""
        self._traces = start_tracing(traces_endpoint, model)

    async def close(self) -> None:
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    # ── requests ──

    def trace(self, message: Submit, arrived: float, unfinished: int) -> RequestTrace | None:
        """Of a request that was accepted; None where nobody traces."""
        return begin_trace(message, arrived, unfinished) if self._traces is not None else None

    def entered(self, request: Request) -> None:
        self.telemetry.lives.entered(request)

    def refused(self, error: Exception, now: float) -> None:
        self.telemetry.note_refused(error)
        if isinstance(error, TreadleError):
            self.live.refused(error, now)

    def ended(self, output: Output, now: float) -> None:
        """A continuation has."""
        at = perf_counter()
        trace = self.telemetry.lives.ended(output, at)
        if trace is not None and self._traces is not None:
            self._traces.put(trace)
        if self.recorder is not None:
            self.recorder.ended(output, at)
        self.live.ended(output, now)

    # ── steps ──

    def sent(self, core: Core | RecordedCore, step: Step, plan: StepPlan, started: Items[Sequence], now: float) -> None:
        """The step has its `out_at`, and gets its `chunks`. started: whose the rows are that the plan starts."""
        step.chunks = self.telemetry.lives.planned(plan, started, step.out_at)
        if self.recorder is not None:
            self.recorder.sent(step, plan, started)
        self.live.planned(core, plan, now)

    def applied(self, core: Core | RecordedCore, now: float) -> None:
        self.live.applied(core, now)

    def landed(self, step: Step) -> None:
        """Its result was applied, and its readers are told next."""
        self.telemetry.lives.landed(step)

    def delivered(self, step: Step) -> None:
        """Its readers have been told."""
        self.telemetry.note(step)
        if self.recorder is not None:
            self.recorder.landed(step)

    def lost(self) -> None:
        """Every row, and every step on its way."""
        at = perf_counter()
        self.telemetry.lives.lost(at)
        if self.recorder is not None:
            self.recorder.lost(at)

    # ── engine groups, and what else happens ──

    def event(self, event: ServiceEvent, now: float) -> None:
        self.telemetry.note_event(event)
        self.live.event(event, now)

    def note(self, kind: str, text: str, detail: str = "") -> None:
        """For the live view."""
        self.live.note(kind, text, detail, asyncio.get_running_loop().time())

    # ── what they say ──

    def metrics(self, tenants: list[TenantFigures]) -> ServiceMetrics:
        traces = self._traces
        outcomes = {"exported": traces.exported, "dropped": traces.dropped} if traces is not None else {}
        return self.telemetry.metrics(tenants, outcomes)

    async def record(self, seconds: float) -> Timeline:
        """What happens in the next seconds. Raises InvalidRequest, and Overloaded while somebody else records."""
        if not 0 < seconds <= MOST_SECONDS:
            raise InvalidRequest(f"seconds={seconds!r}: allowed is above 0 and up to {MOST_SECONDS:g}")
        if self.recorder is not None:
            raise Overloaded("somebody else records this service; try again later", seconds)
        recorder = self.recorder = Recorder(perf_counter(), self.telemetry.lives.rows)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.recorder = None
        return recorder.timeline(perf_counter())
