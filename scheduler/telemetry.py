"""What the service counts of itself while it runs, for less than a hundredth of a step.

A step is noted as a few numbers in an array, and folded into histograms some hundred steps at a time, or when somebody
asks. `Lives` has what is counted by request, `TenantTally` in the core what is counted by tenant.
"""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np

from treadle.errors import Overloaded, TreadleError
from treadle.transport.messages import HistogramFigures, ServiceMetrics, StepResult, TenantFigures

from .histogram import PHASE_SECONDS, RECOVERY_SECONDS, STEP_ROWS, STEP_TOKENS, Histogram
from .lifecycle import GroupLost, GroupReady, ServiceEvent
from .lives import Lives
from .step import Step

PHASES = ("plan", "send", "wait", "forward", "sample", "apply", "deliver")
_FOLD = 256


class Telemetry:
    """phases: seconds of each of `PHASES`, a step each. tokens, rows: of a step. recovery: seconds. lives: of requests.

    refused: requests by reason. losses: engine groups by cause. bad_frames: that clients sent.
    """

    def __init__(self) -> None:
        self.bad_frames = 0
        self.lives = Lives()
        self.recovery = Histogram(RECOVERY_SECONDS)
        self.refused: Counter[str] = Counter()
        self.losses: Counter[str] = Counter()
        self._phases = {phase: Histogram(PHASE_SECONDS) for phase in PHASES}
        self._tokens = Histogram(STEP_TOKENS)
        self._rows = Histogram(STEP_ROWS)
        self._columns = [*self._phases.values(), self._tokens, self._rows]
        self._noted = array("d")
        self._full = _FOLD * len(self._columns)
        self._back_at = 0.0

    # ── what happens ──

    def note(self, step: Step) -> None:
        """The step is over, and its tokens are on their way to their readers."""
        slowest = max(step.results.values(), key=_elapsed) if len(step.results) > 1 else step.results[0]
        back_at = step.back_at
        self._noted.extend(
            (
                step.ready_at - step.plan_at,
                step.out_at - step.ready_at,
                back_at - max(step.out_at, self._back_at),
                slowest.forward_us * 1e-6,
                slowest.sample_us * 1e-6,
                step.applied_at - back_at,
                step.delivered_at - step.deliver_at,
                step.tokens,
                step.rows,
            )
        )
        self._back_at = back_at
        if len(self._noted) >= self._full:
            self._fold()

    def note_refused(self, error: Exception) -> None:
        if isinstance(error, Overloaded):
            self.refused[error.bound] += 1
        else:
            self.refused[error.code if isinstance(error, TreadleError) else "internal"] += 1

    def note_event(self, event: ServiceEvent) -> None:
        if isinstance(event, GroupLost) and event.serving:
            self.losses[event.cause] += 1
        elif isinstance(event, GroupReady):
            self.recovery.observe(event.seconds)

    # ── what is asked ──

    @property
    def phases(self) -> dict[str, Histogram]:
        self._fold()
        return self._phases

    @property
    def tokens(self) -> Histogram:
        self._fold()
        return self._tokens

    @property
    def rows(self) -> Histogram:
        self._fold()
        return self._rows

    def metrics(self, tenants: list[TenantFigures], traces: dict[str, int]) -> ServiceMetrics:
        return ServiceMetrics(
            histograms=self._histograms(),
            tenants=tenants,
            refused=dict(self.refused),
            losses=dict(self.losses),
            traces=traces,
        )

    def _histograms(self) -> list[HistogramFigures]:
        lives = self.lives
        return [
            lives.queue.figures("request_queue_time_seconds"),
            lives.prefill.figures("request_prefill_time_seconds"),
            lives.decode.figures("request_decode_time_seconds"),
            lives.inference.figures("request_inference_time_seconds"),
            self.recovery.figures("recovery_time_seconds"),
            self.tokens.figures("iteration_tokens_total"),
            self.rows.figures("iteration_rows"),
            *(histogram.figures("step_time_seconds", phase) for phase, histogram in self.phases.items()),
        ]

    def _fold(self) -> None:
        if not self._noted:
            return
        table = np.array(self._noted).reshape(-1, len(self._columns))
        del self._noted[:]
        for histogram, values in zip(self._columns, table.T, strict=True):
            histogram.observe_all(values)


def _elapsed(result: StepResult) -> int:
    return result.elapsed_us
