"""What the service counts of itself, held against what happened."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import InvalidParameter, Overloaded, PromptTooLong, ServiceDraining
from treadle.scheduler.client_limits import Allowance, ClientLimits
from treadle.scheduler.histogram import Histogram
from treadle.scheduler.lifecycle import GroupReady
from treadle.scheduler.telemetry import PHASES, Telemetry
from treadle.scheduler.tenant_tally import MOST_NAMED
from treadle.transport.messages import HistogramFigures, SamplingParams, ServiceMetrics

from .corekit import Rig, config
from .faultkit import PROMPTS, faulty, params


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
    rig = Rig(config(num_blocks=20, max_waiting_requests=12, max_num_seqs=6))
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
        queue = rig.service.telemetry.lives.queue
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
    rig = Rig(config(max_tenant_requests=1))
    rig.add("0", [1], tenant="t")
    with pytest.raises(Overloaded) as error:
        rig.add("1", [1], tenant="t")
    telemetry.note_refused(error.value)
    telemetry.note_refused(RuntimeError("ours"))
    assert telemetry.refused == {"client": 2, "tenant": 1, "internal": 1}
