"""Chunks are sized so that decodes stay under the target, with the costs given or learned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corekit import Rig, config
from treadle.errors import ConfigError
from treadle.scheduler.cost_model import CostModel, StepCosts, StepShape
from treadle.scheduler.pace import Pace

COSTS = StepCosts(step=0.01, prefill_token=0.001, decode_row=0.002, context_token=1e-5, chunk_pair=1e-5)
TRUTH = CostModel(COSTS)


@given(
    st.builds(
        StepCosts,
        step=st.floats(0, 0.1),
        prefill_token=st.sampled_from([0.0, 1e-7, 1e-4]),
        decode_row=st.floats(0, 1e-3),
        context_token=st.floats(0, 1e-6),
        chunk_pair=st.sampled_from([0.0, 1e-15, 1e-9, 1e-5]),
    ),
    st.floats(1e-4, 1.0),
    st.integers(1, 200),
    st.integers(0, 5000),
    st.integers(0, 64),
)
@settings(max_examples=200, deadline=None)
def test_a_chunk_is_as_large_as_the_target_allows(
    costs: StepCosts, target: float, rows: int, start: int, taken: int
) -> None:
    model = CostModel(costs)
    shape = StepShape(0, rows, rows * 100).with_chunk(taken, taken + 7)
    room = Pace(target, model, least=16).room(shape, start)
    least = max(0, 16 - taken)
    assert room >= least
    if room > least:
        assert model.predict(shape.with_chunk(room, start + room)) <= target * (1 + 1e-9)
    if room < 1 << 30:
        assert model.predict(shape.with_chunk(room + 2, start + room + 2)) > target * (1 - 1e-9)


def test_nothing_is_bounded_without_a_target_or_without_decodes() -> None:
    assert Pace(None, TRUTH, 4).room(StepShape(0, 9, 900), 0) > 1 << 30
    assert Pace(0.001, TRUTH, 4).room(StepShape(500, 0, 0), 0) > 1 << 30


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 12), st.integers(0, 3)), min_size=2, max_size=12),
    st.sampled_from([0.001, 0.02, 0.03, 0.05]),
)
@settings(max_examples=30, deadline=None)
def test_steps_with_decodes_stay_under_the_target(requests: list[tuple[int, int, int]], target: float) -> None:
    """Or they take along a block of prompt tokens at most. Everybody ends, even if the target cannot be kept."""
    rig = Rig(config(target_tpot=target), costs=CostModel(COSTS))

    def advance() -> None:
        if rig.plan() is None:
            return
        shape = rig.core.last_shape
        if shape.decode_rows and shape.prefill_tokens > rig.config.block_size:
            assert TRUTH.predict(shape) <= target * (1 + 1e-9)  # sums are rounded
        rig.apply()

    for serial, (prompt, output, steps) in enumerate(requests):
        tokens = [(serial * 11 + i) % 100 for i in range(prompt)]
        rig.add(str(serial), tokens, max_tokens=output, ignore_eos=True)
        for _ in range(steps):
            advance()
    while rig.core.has_work:
        advance()
    rig.drain()


def learn(target: float | None) -> tuple[list[float], float]:
    """Seconds of the steps with decodes after a warm-up, and of all, with costs that the core has to find out."""
    rig = Rig(config(target_tpot=target, max_num_batched_tokens=64, pipeline_depth=2, num_blocks=400))
    flights: list[StepShape] = []
    decodes: list[float] = []
    for serial in range(40):
        tokens = [(serial * 17 + i * i) % 100 for i in range(10 + 37 * serial % 45)]
        rig.add(str(serial), tokens, max_tokens=9, ignore_eos=True)
    while rig.core.has_work:
        while rig.plan() is not None:
            flights.append(rig.core.last_shape)
        shape = flights.pop(0)
        rig.now += TRUTH.predict(shape)
        rig.apply(seconds=TRUTH.predict(shape))
        if shape.decode_rows and rig.now > 0.5 and shape.prefill_tokens > rig.config.block_size:
            decodes.append(TRUTH.predict(shape))
    return decodes, rig.now


def test_costs_are_learned_while_it_runs() -> None:
    target = 0.05
    paced, paced_seconds = learn(target)
    free, free_seconds = learn(None)
    assert paced and max(paced) <= 1.1 * target
    assert max(free) > 1.4 * target, "nothing had to be held back"
    assert free_seconds < paced_seconds, "the target costs throughput"


def test_time_is_learned_only_when_it_is_given() -> None:
    rig = Rig()
    rig.add("a", [1, 2, 3], max_tokens=3, ignore_eos=True)
    rig.step()
    assert not rig.core.costs.known
    rig.must_plan()
    rig.apply(seconds=0.25)
    assert rig.core.costs.predict(StepShape(0, 1, 4)) == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("wrong", [{"target_tpot": 0.0}, {"target_tpot": float("nan")}, {"target_tpot": 1e9}])
def test_targets_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="target_tpot"):
        config(**wrong)
