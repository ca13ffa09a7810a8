"""The cost model finds the costs behind what it sees, and what cannot be true is never learned."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.errors import ConfigError
from treadle.scheduler.cost_model import CostModel, StepCosts, StepShape, chunk_pairs, solve_non_negative

GPU = StepCosts(step=6e-3, prefill_token=32e-6, decode_row=4e-6, context_token=40e-9, chunk_pair=1e-9)


def shapes(seed: int, count: int) -> list[StepShape]:
    """Steps as they come: always some rows, a chunk in every third."""
    random = np.random.default_rng(seed)
    steps = []
    for i in range(count):
        rows = int(random.integers(1, 256))
        shape = StepShape(0, rows, int(rows * random.integers(50, 2000)))
        chunk = int(random.integers(16, 2048))
        steps.append(shape.with_chunk(chunk, chunk + int(random.integers(0, 4096))) if i % 3 == 0 else shape)
    return steps


def learned(costs: StepCosts, count: int = 600, noise: float = 0.0) -> CostModel:
    random, truth, model = np.random.default_rng(1), CostModel(costs), CostModel()
    for shape in shapes(0, count):
        model.observe(shape, truth.predict(shape) * float(1 + noise * random.standard_normal()))
    return model


def test_finds_the_costs_behind_the_steps() -> None:
    truth, model = CostModel(GPU), learned(GPU)
    for shape in shapes(9, 200):
        assert model.predict(shape) == pytest.approx(truth.predict(shape), rel=0.01)


def test_noise_costs_little() -> None:
    truth, model = CostModel(GPU), learned(GPU, noise=0.1)
    errors = [abs(model.predict(shape) / truth.predict(shape) - 1) for shape in shapes(9, 200)]
    assert float(np.median(errors)) < 0.05


def test_follows_a_change() -> None:
    model = learned(GPU)
    slower = CostModel(StepCosts(step=12e-3, prefill_token=64e-6, decode_row=8e-6, context_token=80e-9))
    for shape in shapes(5, 2_000):
        model.observe(shape, slower.predict(shape))
    for shape in shapes(9, 100):
        assert model.predict(shape) == pytest.approx(slower.predict(shape), rel=0.05)


def test_what_is_not_seen_is_not_forgotten() -> None:
    """Ten thousand steps without a prompt, and a prompt still costs what it did."""
    truth, model = CostModel(GPU), learned(GPU)
    for i in range(10_000):
        steady = StepShape(0, 64, 64 * (500 + i % 500))
        model.observe(steady, truth.predict(steady))
    chunk = StepShape(0, 64, 64 * 800).with_chunk(1024, 3000)
    assert model.predict(chunk) == pytest.approx(truth.predict(chunk), rel=0.1)


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_a_single_freak_hardly_pulls(factor: float) -> None:
    """A compilation in the middle, or a result that was read together with the last one."""
    truth, model = CostModel(GPU), learned(GPU)
    shape = StepShape(0, 100, 100_000)
    for _ in range(2):
        model.observe(shape, truth.predict(shape) * factor)
    for shape in shapes(3, 32):
        model.observe(shape, truth.predict(shape))
    for shape in shapes(9, 100):
        assert model.predict(shape) == pytest.approx(truth.predict(shape), rel=0.15)


def test_times_that_cannot_be_are_ignored() -> None:
    model = learned(GPU)
    before = model.coefficients, model.observations
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        model.observe(StepShape(10, 10, 10), seconds)
    assert (model.coefficients, model.observations) == before


def test_nothing_is_known_at_first() -> None:
    model = CostModel()
    assert not model.known and model.predict(StepShape(1000, 10, 1000)) == 0.0
    model.observe(StepShape(100, 0, 0, chunk_pairs(100, 100)), 0.1)
    assert model.known and model.predict(StepShape(100, 0, 0, chunk_pairs(100, 100))) == pytest.approx(0.1, rel=0.01)


def test_costs_travel_as_json() -> None:
    assert StepCosts.from_json(GPU.to_json()) == GPU
    for bad in (
        b'{"step": -1}',
        b'{"stepp": 1}',
        b'{"step": "1"}',
        b"[]",
        b"\xff",
        b'{"step": 1e999}',
        b'{"step": 1e7}',
        b"",
    ):
        with pytest.raises(ConfigError, match="step"):
            StepCosts.from_json(bad)
    with pytest.raises(ConfigError, match="decode_row"):
        CostModel(StepCosts(decode_row=float("nan")))


def test_pairs_of_a_chunk() -> None:
    assert [chunk_pairs(1, 7), chunk_pairs(4, 4), chunk_pairs(3, 10)] == [7, 1 + 2 + 3 + 4, 8 + 9 + 10]
    whole, cut = StepShape(0, 0, 0).with_chunk(10, 30), StepShape(0, 0, 0).with_chunk(4, 24).with_chunk(6, 30)
    assert whole == cut


@given(
    st.lists(st.tuples(*[st.integers(0, 4096)] * 4, st.floats(1e-5, 10.0)), min_size=1, max_size=150),
)
@settings(max_examples=60, deadline=None)
def test_coefficients_are_never_negative_nor_nonsense(steps: list[tuple[int, int, int, int, float]]) -> None:
    model = CostModel()
    for tokens, rows, context, pairs, seconds in steps:
        model.observe(StepShape(tokens, rows, context, pairs), seconds)
        assert all(0 <= value < 1e6 for value in model._values.tolist())


@given(st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_least_of_all_supports(seed: int, size: int) -> None:
    """The active-set method finds what trying every support finds."""
    random = np.random.default_rng(seed)
    root = random.standard_normal((size + 2, size))
    matrix, target = root.T @ root + 1e-3 * np.eye(size), random.standard_normal(size)

    def value(x: np.ndarray) -> float:
        return float(x @ matrix @ x / 2 - x @ target)

    best = 0.0
    for support in itertools.chain.from_iterable(itertools.combinations(range(size), k) for k in range(1, size + 1)):
        x = np.zeros(size)
        x[list(support)] = np.linalg.solve(matrix[np.ix_(support, support)], target[list(support)])
        if (x >= 0).all():
            best = min(best, value(x))
    found = solve_non_negative(matrix, target)
    assert (found >= 0).all() and value(found) == pytest.approx(best, abs=1e-9)
