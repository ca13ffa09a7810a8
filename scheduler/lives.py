"""Where each sequence stands: waiting, being prefilled, decoding, interrupted; told by the plans, as ranks are.

Work is done where rows change hands and for chunks of prompts. A step that only decodes costs one look at a dictionary.
Times are `time.perf_counter`'s, and come from outside.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from treadle.transport.codec import unpack
from treadle.transport.messages import StepPlan

from .delivery import route_of
from .histogram import REQUEST_SECONDS, Histogram
from .request import Output, Request, Sequence
from .request_trace import End, Part, RequestTrace
from .step import Chunk, Step


class _Life:
    """scheduled, first: when it first got a row, and a token; 0 before. phase: since when it does what it does now.

    told: tokens of output at `since`.
    """

    __slots__ = ("first", "phase", "scheduled", "since", "told", "trace")

    def __init__(self, trace: RequestTrace | None, arrived: float) -> None:
        self.trace = trace
        self.scheduled = self.first = 0.0
        self.phase = "queue"
        self.since = arrived
        self.told = 0

    def enter(self, phase: str, now: float) -> None:
        self.phase, self.since = phase, now

    def close(self, sequence: Sequence, now: float, tokens: int) -> None:
        """What it did since `since` is over; chunks of a prompt are parts of their own. tokens: of output by now."""
        if self.trace is not None and self.phase != "prefill":
            new = tokens - self.told if self.phase == "decode" else 0
            self.trace.add(Part(sequence.index, self.phase, self.since, now, new))
        self.told = tokens


class Lives:
    """queue, prefill, decode, inference: histograms of seconds, by continuation."""

    def __init__(self) -> None:
        self.queue = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.decode = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.rows: dict[int, Sequence] = {}
        self._lives: dict[Sequence, _Life] = {}
        self._left: dict[int, int] = {}
        self._landed_at = 0.0

    def entered(self, request: Request) -> None:
        """Only traced requests are known before they run."""
        route = route_of(request.sequences[0])
        if route.trace is not None:
            for sequence in request.sequences:
                self._lives[sequence] = _Life(route.trace, route.arrived)

    def planned(self, plan: StepPlan, started: Items[Sequence], now: float) -> tuple[Chunk, ...]:
        """A plan goes out; `started` have its new rows. Returns the chunks of prompts in it."""
        for row in unpack(plan.release).tolist() if plan.release else ():
            self._release(row, now)
        for start, sequence in zip(plan.start, started, strict=True):
            self.rows[start.row] = sequence
            self._left[start.row] = len(start.tokens) // 4 - start.computed
            self._start(sequence, now)
        return self._chunks(plan) if self._left else ()

    def landed(self, step: Step) -> None:
        """Every rank has answered, and the result was applied."""
        for chunk in step.chunks:
            life = self._lives.get(chunk.sequence)
            if life is not None:
                self._land(chunk, life, step)
        self._landed_at = step.back_at

    def ended(self, output: Output, now: float) -> RequestTrace | None:
        """A sequence has ended, wherever it was. Returns what was traced of its request, if that is over with it."""
        sequence = output.sequence
        life = self._lives.pop(sequence, None)
        if life is None:
            return None  # untraced, and it never ran
        if life.scheduled:
            self.inference.observe(now - life.scheduled)
        if life.first:
            self.decode.observe(now - life.first)
        trace = life.trace
        if trace is None:
            return None
        life.close(sequence, now, output.length)
        end = End(
            sequence.index,
            now,
            output.finish,
            life.scheduled,
            life.first,
            output.length,
            output.cached_tokens,
        )
        trace.ends.append(end)
        trace.open -= 1
        return None if trace.open else trace

    def lost(self, now: float) -> None:
        """The engine group is gone: whoever had a row waits for another."""
        for sequence in self.rows.values():
            self._interrupt(sequence, "recovery", now)
        self.rows.clear()
        self._left.clear()

    # ── inside ──

    def _start(self, sequence: Sequence, now: float) -> None:
        route = route_of(sequence)
        life = self._lives.get(sequence)
        if life is None:
            life = self._lives[sequence] = _Life(None, route.arrived)
        if life.trace is not None:
            life.close(sequence, now, life.told)
        life.enter("prefill", now)
        if not life.scheduled:
            life.scheduled = now
            if route.arrived:
                self.queue.observe(now - route.arrived)

    def _release(self, row: int, now: float) -> None:
        self._left.pop(row, None)
        sequence = self.rows.pop(row, None)
        if sequence is not None:
            self._interrupt(sequence, "preempted", now)

    def _interrupt(self, sequence: Sequence, phase: str, now: float) -> None:
        """It has no row any more, and if it has not ended it wants another."""
        life = self._lives.get(sequence)
        if life is not None and not sequence.finish:
            if life.trace is not None:
                life.close(sequence, now, sequence.known - sequence.request.prompt_len)
            life.enter(phase, now)

    def _chunks(self, plan: StepPlan) -> tuple[Chunk, ...]:
        """Chunks stand behind the decodes, but for one of a single token that was left over, which counts as one."""
        rows, counts = unpack(plan.rows), unpack(plan.counts)
        if 1 not in self._left.values():
            rows, counts = rows[-len(self._left) :], counts[-len(self._left) :]
        chunks: list[Chunk] = []
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            left = self._left.get(row)
            if left is None:
                continue
            chunks.append(Chunk(self.rows[row], count, count == left))
            if count == left:
                del self._left[row]
            else:
                self._left[row] = left - count
        return tuple(chunks)

    def _land(self, chunk: Chunk, life: _Life, step: Step) -> None:
        if life.trace is not None:
            began = max(step.out_at, self._landed_at)
            index = chunk.sequence.index
            life.trace.add(Part(index, "prefill", began, step.back_at, chunk.tokens, step.number))
        if not chunk.last:
            return
        if not life.first:
            life.first = step.back_at
            self.prefill.observe(step.back_at - life.scheduled)
        if life.phase == "prefill":
            life.enter("decode", step.back_at)
            life.told += 1
