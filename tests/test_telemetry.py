"""What the service counts of itself, held against what happened."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import InvalidParameter, Overloaded, PromptTooLong, ServiceDraining
from treadle.scheduler.client_limits import Allowance, ClientLimits
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.delivery import Route
from treadle.scheduler.histogram import Histogram
from treadle.scheduler.lifecycle import GroupReady
from treadle.scheduler.lives import Lives
from treadle.scheduler.request import Output, Outputs
from treadle.scheduler.request_trace import End, RequestTrace, begin_trace
from treadle.scheduler.step import Step, sent
from treadle.scheduler.telemetry import PHASES, Telemetry
from treadle.scheduler.tenant_tally import MOST_NAMED
from treadle.transport.codec import pack
from treadle.transport.messages import HistogramFigures, SamplingParams, ServiceMetrics, StepPlan, StepResult, Submit

from .corekit import Rig, config
from .faultkit import PROMPTS, Collector, faulty, params


def histogram(metrics: ServiceMetrics, name: str, phase: str = "") -> HistogramFigures:
    [found] = [h for h in metrics.histograms if (h.name, h.phase) == (name, phase)]
    return found


@given(st.lists(st.floats(0, 100)), st.sets(st.floats(0.001, 50), min_size=1, max_size=9))
def test_a_histogram_counts_as_prometheus_does(values: list[float], bounds: set[float]) -> None:
    one, many = Histogram(tuple(sorted(bounds))), Histogram(tuple(sorted(bounds)))
    for value in values:
        one.observe(value)
    many.observe_all(np.array(values, np.float64))
    assert one.counts == many.counts and one.count == len(values)
    assert one.total == pytest.approx(sum(values)) == pytest.approx(many.total)
    for place, bound in enumerate(one.bounds):
        assert sum(one.counts[: place + 1]) == sum(value <= bound for value in values), "bounds are inclusive"


def test_tenants_get_what_their_requests_got() -> None:
    """Few blocks, so that some are preempted; aborts, a dead engine and a refusal in between."""
    rig = Rig(config(num_blocks=20, max_waiting_requests=6, max_num_seqs=6))
    chance = random.Random(5)
    tenants = {f"{i}": ("a", "b", "")[i % 3] for i in range(12)}
    for name, tenant in tenants.items():
        rig.add(name, [1 + int(name)] * chance.randint(1, 20), tenant=tenant, max_tokens=chance.randint(1, 25))
    with pytest.raises(Overloaded):
        rig.add("more", [1], tenant="c")
    rig.core.note_refused("c")
    rig.abort("3")
    for step in range(400):
        while rig.plan() is not None:
            pass
        if not rig.core.in_flight:
            break
        rig.apply()
        if step == 9:
            rig.reset()
        figures, stats = rig.core.tenants(), rig.core.stats()
        assert sum(t.running for t in figures) == stats.running
        assert sum(t.waiting for t in figures) == stats.waiting
        assert sum(t.prompt_tokens for t in figures) == stats.prompt_tokens
        assert sum(t.cached_prompt_tokens for t in figures) == stats.cached_prompt_tokens
        got = dict.fromkeys(("a", "b", "default", "c"), 0)
        for (name, _), tokens in rig.tokens.items():
            got[tenants[name] or "default"] += len(tokens)
        assert {t.name: t.generated_tokens for t in figures} == got
    assert rig.core.stats().preemptions > 0
    assert {t.name: (t.finished, t.refused) for t in rig.core.tenants()} == {
        **dict.fromkeys(("a", "b", "default"), (4, 0)),
        "c": (0, 1),
    }


def test_made_up_tenants_fill_nothing() -> None:
    rig = Rig(config(max_waiting_requests=1000))
    for i in range(MOST_NAMED + 30):
        rig.add(str(i), [1, 2], tenant=f"t{i}", max_tokens=2)
    rig.drain()
    figures = rig.core.tenants()
    assert len(figures) == MOST_NAMED + 1
    assert [t.generated_tokens for t in figures] == [2] * MOST_NAMED + [60]
    assert figures[-1].name == "other"


class Followed(Rig):
    """A core whose requests are followed as the service does it. The clock ticks at every event."""

    def __init__(self, config: CoreConfig) -> None:
        super().__init__(config)
        self.lives, self.sink, self.clock = Lives(), Collector(), itertools.count(1)
        self.steps: list[Step] = []
        self.traces: dict[str, RequestTrace] = {}
        self.ended: set[str] = set()

    def follow(self, name: str, prompt: int, **params: object) -> None:
        request = self.add(name, [1 + len(self.traces)] * prompt, **params)  # type: ignore[arg-type]
        at = float(next(self.clock))
        submit = Submit(id=name, tokens=pack([1] * prompt), params=request.params)
        self.traces[name] = begin_trace(submit, at, request.unfinished)
        request.context = Route(self.sink, name, -1, at, self.traces[name])
        self.lives.entered(request)

    def plan(self) -> StepPlan | None:
        plan = super().plan()
        if plan is not None:
            step = sent(plan, b"", 0.0)
            step.out_at = float(next(self.clock))
            step.chunks = self.lives.planned(plan, self.core.started(plan), step.out_at)
            self.steps.append(step)
        return plan

    def apply(self, result: StepResult | None = None, seconds: float = 0.0) -> Outputs:
        step = self.steps.pop(0)
        step.back_at = float(next(self.clock))
        outputs = super().apply(result, seconds)
        self.lives.landed(step)
        self.tell(outputs.others)
        return outputs

    def reset(self) -> list[Output]:
        self.steps.clear()
        outputs = super().reset()
        self.lives.lost(float(next(self.clock)))
        self.tell(outputs)
        return outputs

    def tell(self, outputs: list[Output]) -> None:
        for output in outputs:
            trace = self.lives.ended(output, float(next(self.clock))) if output.finish else None
            if trace is not None:
                self.ended.add(trace.submit.id)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_life_is_told_without_gaps(data: st.DataObject) -> None:
    """Whatever is preempted, aborted, in flight or lost: one thing at a time, and every token in its place."""
    depth = data.draw(st.integers(1, 3))
    rig = Followed(config(num_blocks=data.draw(st.integers(17, 30)), pipeline_depth=depth, max_prefill_chunk=8))
    events = data.draw(
        st.lists(st.sampled_from(("add", "add", "plan", "plan", "apply", "apply", "abort", "reset")), max_size=60)
    )
    for event in events:
        if event == "add" and len(rig.traces) < 9:
            n, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 20))
            rig.follow(str(len(rig.traces)), data.draw(st.integers(1, 25)), n=n, max_tokens=tokens, seed=1)
        elif event == "plan":
            rig.plan()
        elif event == "apply" and rig.steps:
            rig.apply()
        elif event == "abort" and rig.traces:
            rig.tell(rig.abort(data.draw(st.sampled_from(sorted(rig.traces)))))
        elif event == "reset":
            rig.reset()
    while rig.plan() is not None or rig.steps:
        rig.apply()
    assert rig.ended == set(rig.traces), "each is told once, when its last continuation has ended"
    for name, trace in rig.traces.items():
        for end in trace.ends:
            check_life(trace, end, len(rig.tokens[name, end.continuation]))
    assert rig.lives.inference.count == sum(end.scheduled > 0 for trace in rig.traces.values() for end in trace.ends)
    assert rig.lives.decode.count == rig.lives.prefill.count


def check_life(trace: RequestTrace, end: End, got: int) -> None:
    parts = [part for part in trace.parts if part.continuation == end.continuation]
    assert (parts[0].name, parts[0].began) == ("queue", trace.arrived)
    assert end.tokens == got and parts[-1].ended <= end.at
    apart = [part for part in parts if part.name != "prefill"]  # a chunk in flight may land when its row is gone
    assert all(before.ended <= after.began for before, after in itertools.pairwise(apart))
    assert bool(end.first) == any(part.name == "decode" for part in parts) or end.finish != "length"
    decodes = [part for part in parts if part.name == "decode"]
    assert sum(part.tokens for part in decodes) + len(decodes) <= got
    if len(apart) == 2 and end.finish == "length":  # nothing came in between
        chunks = [part for part in parts if part.name == "prefill"]
        assert sum(part.tokens for part in chunks) + max(0, end.cached) == trace.prompt_tokens
        assert sum(part.tokens for part in decodes) + 1 == got
        assert chunks[0].began >= end.scheduled and chunks[-1].ended == end.first == decodes[0].began


@pytest.mark.asyncio
async def test_steps_and_requests_are_counted_as_they_were(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.002, max_num_batched_tokens=16) as rig:
        began = time.perf_counter()
        rig.submit_all()
        await rig.all_ended()
        took = time.perf_counter() - began
        metrics, steps = rig.service.metrics(), rig.service.stats().step
    outputs = [len(rig.sink.tokens[str(i)]) for i in range(len(PROMPTS))]
    tokens = histogram(metrics, "iteration_tokens_total")
    assert tokens.total == sum(map(len, PROMPTS)) + sum(outputs) - len(PROMPTS), "the last token is not computed"
    rows = histogram(metrics, "iteration_rows")
    chunks = 40 // 16 + 1  # the long prompt had to share its steps
    assert sum(rows.counts) == sum(tokens.counts) == steps
    assert rows.total >= sum(outputs) - len(PROMPTS) + len(PROMPTS) - 1 + chunks
    phases = {phase: histogram(metrics, "step_time_seconds", phase) for phase in PHASES}
    assert all(sum(figures.counts) == steps and figures.total >= 0 for figures in phases.values())
    assert 0.002 * steps <= phases["forward"].total <= phases["wait"].total <= took
    assert 0 < phases["sample"].total < phases["wait"].total - phases["forward"].total
    assert all(0 < phases[phase].total < took for phase in ("plan", "send", "apply", "deliver"))
    names = ("queue", "prefill", "decode", "inference")
    times = {name: histogram(metrics, f"request_{name}_time_seconds") for name in names}
    assert all(sum(figures.counts) == len(PROMPTS) for figures in times.values())
    assert times["inference"].total == pytest.approx(times["prefill"].total + times["decode"].total)
    assert times["queue"].total + times["inference"].total <= len(PROMPTS) * took
    assert times["decode"].total >= 0.002 * (sum(outputs) - len(PROMPTS)), "each token took a step"


@pytest.mark.asyncio
async def test_a_queue_is_waited_in(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.004, max_num_seqs=1) as rig:
        rig.submit("first", [1], params(0, 30))
        rig.submit("second", [2], params(1, 2))
        await rig.sink.ended("first", "second")
        queue = rig.service.observers.telemetry.lives.queue
    assert queue.total >= 30 * 0.004, "the second began when the first had ended"
    assert queue.count == 2


@pytest.mark.asyncio
async def test_losses_and_recoveries_are_timed(tmp_path: Path) -> None:
    async with faulty(tmp_path, "1 5 exit", "0 12 raise", pace=0.002) as rig:
        rig.submit_all()
        await rig.all_ended()
        metrics = rig.service.metrics()
    assert rig.exact()
    assert metrics.losses == {"exit": 1, "raised": 1}
    ready = [event.seconds for event in rig.events if isinstance(event, GroupReady)]
    recovery = histogram(metrics, "recovery_time_seconds")
    assert (sum(recovery.counts), recovery.total) == (2, pytest.approx(sum(ready)))
    assert sum(histogram(metrics, "request_queue_time_seconds").counts) == len(PROMPTS), "they queued once"


@pytest.mark.asyncio
async def test_refusals_are_counted_by_reason_and_tenant(tmp_path: Path) -> None:
    bounds = {"max_num_seqs": 1, "max_waiting_requests": 3, "max_tenant_requests": 1}
    async with faulty(tmp_path, pace=0.01, **bounds) as rig:
        long = SamplingParams(max_tokens=400)
        for name in ("a", "b", "c", "d"):
            rig.submit(name, [1], long, tenant=name)
        for tenant, prompt, chosen, kind in (
            ("b", [1], long, Overloaded),  # its one place is taken
            ("e", [1], long, Overloaded),
            ("e", [1] * 600, long, PromptTooLong),
            ("", [1], SamplingParams(top_p=7.0), InvalidParameter),
        ):
            with pytest.raises(kind):
                rig.submit("x", prompt, chosen, tenant=tenant)
        await rig.sink.begun("a")
        metrics = rig.service.metrics()
        rig.service.detach(rig.sink)
        assert await rig.service.drain(1.0)
        with pytest.raises(ServiceDraining):
            rig.submit("late", [1], long)
        after = rig.service.metrics()
    assert metrics.refused == {"queue": 2, "prompt_too_long": 1, "invalid_parameter": 1}
    assert after.refused == metrics.refused | {"service_draining": 1}
    assert {t.name: t.refused for t in metrics.tenants if t.refused} == {"b": 1, "e": 2, "default": 1}
    running = {t.name: (t.running, t.waiting) for t in metrics.tenants}
    assert running == {"a": (1, 0), "b": (0, 1), "c": (0, 1), "d": (0, 1), "e": (0, 0), "default": (0, 0)}


def test_bounds_say_which_they_are() -> None:
    telemetry, allowance = Telemetry(), Allowance(ClientLimits(requests=1, messages_per_second=1))
    for refused in (lambda: allowance.request(1, 1), lambda: [allowance.message(0.0) for _ in range(3)]):
        with pytest.raises(Overloaded) as error:
            refused()
        telemetry.note_refused(error.value)
    rig = Rig(config(max_num_seqs=1, max_tenant_requests=1))
    for name in ("0", "1"):
        rig.add(name, [1], tenant="t")
    with pytest.raises(Overloaded) as error:
        rig.add("2", [1], tenant="t")
    telemetry.note_refused(error.value)
    telemetry.note_refused(RuntimeError("ours"))
    assert telemetry.refused == {"client": 2, "tenant": 1, "internal": 1}
