"""Preemption by swap and by recomputing, through the core: which one, what moves when, and that no token changes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.corekit import Rig, config
from treadle.errors import ConfigError
from treadle.http.metrics import Metrics
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import CostModel, StepCosts, StepShape
from treadle.scheduler.event_log import EventWriter
from treadle.scheduler.fake_engine import FakeEngine
from treadle.scheduler.recording import RecordedCore, plan_digest
from treadle.scheduler.replay import replay
from treadle.transport.codec import pack, unpack
from treadle.transport.messages import Health, SamplingParams, Stats, StepPlan, Submit

# Of blocks of 4 tokens: one at the start of a sequence is computed in 5 ms, the sixth in 25. Moving one takes 16.
LONG_ONLY = StepCosts(prefill_token=1e-3, chunk_pair=2.5e-4, block_out=8e-3, block_in=8e-3)


def text(length: int, seed: int = 0) -> list[int]:
    return [(7 * seed + 3 * i + i * i) % 100 for i in range(length)]


def rig(costs: StepCosts | None = None, **changes: object) -> Rig:
    """Room for 8 blocks on the device and 20 in host memory."""
    values: dict[str, object] = {"num_blocks": 9, "swap_blocks": 20, "pipeline_depth": 1, **changes}
    return Rig(config(**values), costs=None if costs is None else CostModel(costs))


def pairs(data: bytes) -> list[tuple[int, int]]:
    return [(a, b) for a, b in unpack(data).reshape(-1, 2).tolist()]


def two_too_many(made: Rig, old: int = 12, young: int = 12) -> list[StepPlan]:
    """Both fit as prompts, and not as what they become: the young one gives way. All plans until both have ended."""
    made.add("old", text(old, 1), max_tokens=12, ignore_eos=True)
    made.add("young", text(young, 2), max_tokens=12, ignore_eos=True)
    plans = []
    while made.core.has_work:
        plans.append(made.must_plan())
        made.apply()
    made.drain()
    return plans


def test_a_victim_is_swapped_out_as_its_blocks_are_taken_and_comes_back() -> None:
    made = rig(preemption="swap")
    plans = two_too_many(made)
    stats = made.core.stats()
    assert (stats.preemptions, stats.swapped_preemptions) == (1, 1)
    back = next(plan for plan in plans if plan.copy_in)
    assert len(back.start[0].tokens) // 4 - back.start[0].computed <= 4  # nothing but its last tokens is computed again
    assert stats.swapped_in_blocks == len(pairs(back.copy_in)) > 0
    out = [pair for plan in plans for pair in pairs(plan.copy_out)]
    assert {place for place, _ in pairs(back.copy_in)} <= {place for _, place in out}
    assert stats.recomputed_tokens < 4


def test_recomputed_when_told_so_though_there_is_host_memory() -> None:
    made = rig(preemption="recompute")
    plans = two_too_many(made)
    stats = made.core.stats()
    assert (stats.preemptions, stats.swapped_preemptions, stats.swapped_out_blocks) == (1, 0, 0)
    assert not any(plan.copy_out or plan.copy_in for plan in plans)
    assert stats.recomputed_tokens >= 8


def test_a_long_victim_is_swapped_and_a_short_one_computed_again() -> None:
    for young, swapped in ((8, 0), (20, 1)):
        made = rig(LONG_ONLY, preemption="auto", num_blocks=11 if swapped else 7)
        two_too_many(made, old=12, young=young)
        stats = made.core.stats()
        assert (stats.preemptions, stats.swapped_preemptions) == (1, swapped)
        assert (stats.swapped_out_blocks > 0) == bool(swapped)


def test_one_core_does_both() -> None:
    made = rig(LONG_ONLY, preemption="auto", num_blocks=17, max_num_batched_tokens=80)
    for i, length in enumerate((6, 30, 7, 33, 8, 28)):
        made.add(str(i), text(length, i), max_tokens=26, ignore_eos=True, seed=i)
    made.drain()
    stats = made.core.stats()
    assert 0 < stats.swapped_preemptions < stats.preemptions


@pytest.mark.parametrize(("costs", "swaps"), [(StepCosts(prefill_token=1e-3), True), (LONG_ONLY, False)])
def test_cheap_copies_save_whatever_is_evicted_and_dear_ones_do_not(costs: StepCosts, swaps: bool) -> None:
    """Without any preemption: an old conversation is found again after others have taken its blocks."""
    made = rig(costs)
    made.add("first", text(24, 1), max_tokens=1)
    made.drain()
    for i in range(2, 5):
        made.add(f"other {i}", text(24, i), max_tokens=1)
        made.drain()
    again = made.add("again", [*text(24, 1), 5], max_tokens=1)
    plan = made.must_plan()
    assert bool(plan.copy_in) == swaps
    made.drain()
    assert again.sequences[0].cached_tokens == (24 if swaps else 0)
    stats = made.core.stats()
    assert (stats.cpu_hit_tokens, stats.preemptions) == (24 if swaps else 0, 0)


def test_a_hit_that_is_dearer_to_fetch_than_to_compute_is_computed() -> None:
    """Costs change: what was worth saving is not worth fetching."""
    costs = CostModel(StepCosts(prefill_token=1e-3))
    made = Rig(config(num_blocks=9, swap_blocks=20), costs=costs)
    made.add("first", text(24, 1), max_tokens=1)
    made.drain()
    made.add("other", text(28, 2), max_tokens=1)
    made.drain()
    kept = made.core.stats().cpu_blocks_used
    assert kept
    made.core._running.swapping._costs = CostModel(StepCosts(prefill_token=1e-3, block_in=1.0))
    made.add("again", [*text(24, 1), 5], max_tokens=1)
    plan = made.must_plan()
    assert not plan.copy_in and plan.start[0].computed < 24
    made.drain()
    assert made.core.stats().cpu_blocks_used < kept  # what was computed again is in one tier only


def test_nothing_is_kept_for_an_engine_that_died() -> None:
    made = rig(preemption="swap")
    made.add("first", text(24, 1), max_tokens=1)
    made.drain()
    made.add("other", text(28, 2), max_tokens=1)
    made.drain()
    assert made.core.stats().cpu_blocks_used
    made.reset()
    assert made.core.stats().cpu_blocks_used == 0
    made.add("again", [*text(24, 1), 5], max_tokens=1)
    assert made.must_plan().start[0].computed == 0
    made.drain()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("swap_blocks", [1, 4, 60])
def test_swap_changes_no_token(depth: int, swap_blocks: int) -> None:
    made = rig(preemption="swap", num_blocks=13, swap_blocks=swap_blocks, pipeline_depth=depth)
    for i in range(5):
        made.add(str(i), text(6, i), max_tokens=30, ignore_eos=True, seed=i)
    made.drain()
    stats = made.core.stats()
    assert stats.preemptions and stats.swapped_in_blocks


def test_a_step_with_copies_costs_more_and_leaves_less_room_under_a_target() -> None:
    costs = CostModel(StepCosts(step=0.01, prefill_token=1e-3, block_in=2e-3, block_out=1e-3))
    plain = StepShape(0, 4, 100)
    assert costs.predict(StepShape(0, 4, 100, 0, 3, 5)) == pytest.approx(costs.predict(plain) + 0.013)
    assert StepShape(0, 4, 100, 0, 3, 5).with_chunk(8, 8).blocks_in == 5


def test_costs_of_copies_are_learned_and_a_freak_does_not_end_swapping() -> None:
    truth = CostModel(StepCosts(step=5e-3, prefill_token=1e-4, decode_row=1e-5, block_in=3e-4, block_out=1e-5))
    model = CostModel(StepCosts(block_in=1e-4, block_out=1e-4))
    for i in range(30):
        shape = StepShape(16 * (i % 4), 8, 0)
        model.observe(shape, truth.predict(shape))
    model.observe(StepShape(0, 8, 0, 0, 0, 4), 0.5)
    assert model.coefficients.block_in < 6e-4
    for i in range(600):
        shape = StepShape(16 * (i % 4), 8, 0, 0, i % 3, i % 5)
        model.observe(shape, truth.predict(shape))
    assert model.coefficients.block_in == pytest.approx(3e-4, rel=0.1)
    for i in range(8_000):
        shape = StepShape(16 * (i % 4), 8, 0)
        model.observe(shape, truth.predict(shape))
    assert model.coefficients.block_in == pytest.approx(1e-4, rel=0.1)  # long ago: what was measured counts again


def test_prometheus_is_told_where_there_is_host_memory() -> None:
    made = rig(preemption="swap")
    two_too_many(made)
    stats = made.core.stats()
    page = Metrics().page("m", stats, None, Health(state="ready")).decode()
    for name, value in (
        ("cpu_cache_usage_perc", stats.cpu_blocks_used / 20),
        ("cpu_prefix_cache_hits_total", stats.cpu_hit_tokens),
        ("swapped_out_blocks_total", stats.swapped_out_blocks),
        ("swapped_in_blocks_total", stats.swapped_in_blocks),
        ("num_swapped_preemptions_total", 1),
    ):
        assert f'treadle:{name}{{model_name="m"}} {float(value)}' in page
    assert "swapped" not in Metrics().page("m", Stats(), None, Health(state="ready")).decode()


def test_a_log_of_swaps_replays(tmp_path: Path) -> None:
    """Costs are in the log, so the same choices are made; and a copy that goes elsewhere is a difference."""
    path = tmp_path / "log"
    writer = EventWriter(path)
    chosen = config(num_blocks=11, swap_blocks=20, swap_out_seconds=1e-3, swap_in_seconds=1e-3)
    core, engine = RecordedCore(chosen, lambda: 1, writer), FakeEngine(chosen)
    for i, length in enumerate((12, 20, 9)):
        core.add(Submit(id=str(i), tokens=pack(text(length, i)), params=SamplingParams(max_tokens=14, seed=i)), 0.0)
    copied = 0
    while core.has_work:
        plan = core.plan(0.0)
        assert plan is not None
        copied += len(plan.copy_in)
        core.apply(engine.run(plan), 0.0, 0.002 * int(unpack(plan.counts).sum()))
    writer.close()
    assert copied and core.stats().preemptions
    assert replay(path, check=True).good
    digest = plan_digest(plan)
    assert digest.copies == 0 != plan_digest(msgspec.structs.replace(plan, copy_in=pack([1, 2]))).copies


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"preemption": "maybe"}, "auto, recompute, swap"),
        ({"preemption": "swap"}, "swap_space"),
        ({"swap_blocks": 4, "prefix_cache": False}, "prefix_cache"),
        ({"swap_blocks": -1}, "at least 0"),
        ({"swap_in_seconds": float("nan")}, "swap_in_seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CoreConfig(num_blocks=9, vocab_size=10, **changes)  # type: ignore[arg-type]
