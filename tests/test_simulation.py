"""Virtual time, computed by hand; and the simulated engine beside the one that verifies every context."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.fake_engine import FakeEngine
from treadle.scheduler.simulation.engine import SimulatedEngine
from treadle.scheduler.simulation.histogram import Histogram
from treadle.scheduler.simulation.replica import Replica
from treadle.scheduler.simulation.timeline import Moment, Timeline
from treadle.transport.messages import StepPlan

from .simkit import SECOND, config, random_work, run, work


def test_one_request_takes_a_step_per_token() -> None:
    first, finish, result = run(work((2.0, 4, 3)))
    assert (first, finish) == ([3.0], [5.0])
    assert (result.steps, result.busy, result.seconds) == (3, 3.0, 5.0)
    assert result.ends == {"length": 1}
    assert sum(result.between) == 2 and Histogram(result.between).percentile(50) == pytest.approx(1.0, rel=0.02)


def test_with_two_plans_in_flight_a_request_waits_for_both() -> None:
    """Steps [0, 1] and [1, 2] are on their way at 0.5; at 1 a plan with the prompt is sent, and runs in [2, 3]."""
    workload = work((0.0, 4, 9), (0.5, 4, 1))
    assert run(workload, pipeline_depth=2)[0] == [1.0, 3.0]
    assert run(workload, pipeline_depth=1)[0] == [1.0, 2.0], "a plan is made when the step in flight is back"
    assert run(workload, pipeline_depth=3)[0] == [1.0, 4.0]


def test_two_plans_hide_the_scheduler_and_one_does_not() -> None:
    workload = work((0.0, 4, 5))
    assert run(workload, overhead=0.25, pipeline_depth=2)[1] == [5.0]
    assert run(workload, overhead=0.25, pipeline_depth=1)[1] == [6.0], "four gaps of a quarter"


def test_an_engine_that_was_idle_begins_at_once() -> None:
    first, finish, result = run(work((0.0, 4, 1), (10.25, 4, 1)))
    assert (first, finish) == ([1.0, 11.25], [1.0, 11.25])
    assert (result.busy, result.seconds) == (2.0, 11.25)


def test_what_a_step_costs() -> None:
    """Prompt of 4: 1 + 4·0.1 + 10 pairs·0.001. Then a row at contexts 5 and 6: 1 + 0.01 + 5·0.002, and 6·0.002."""
    costs = StepCosts(step=1.0, prefill_token=0.1, decode_row=0.01, context_token=0.002, chunk_pair=0.001)
    first, finish, _ = run(work((0.0, 4, 3)), costs)
    assert first == [pytest.approx(1.41)]
    assert finish == [pytest.approx(1.41 + 1.02 + 1.022)]


def test_chunks_of_a_prompt_and_their_pairs() -> None:
    """8 tokens in chunks of 3: pairs 6, 15 and 15. Of 7 tokens the last is left alone, and computed as decodes are."""
    costs = StepCosts(step=1.0, chunk_pair=0.001, context_token=0.1)
    assert run(work((0.0, 8, 1)), costs, max_prefill_chunk=3)[0] == [pytest.approx(3.036)]
    assert run(work((0.0, 7, 1)), costs, max_prefill_chunk=3)[0] == [pytest.approx(3.021 + 0.7)]


def test_a_shared_prefix_is_not_computed_again() -> None:
    """The second has 8 of its 10 tokens in the cache: 2 to compute."""
    workload = work((0.0, 10, 1), (5.0, 10, 1), prefix=3, prefix_tokens=8)
    costs = StepCosts(prefill_token=0.1)
    assert run(workload, costs)[0] == [pytest.approx(1.0), pytest.approx(5.2)]
    assert run(workload, costs, prefix_cache=False)[0] == [pytest.approx(1.0), pytest.approx(6.0)]


def test_blocks_that_come_back_from_host_memory_cost_what_they_cost() -> None:
    """8 of the third's 10 tokens were evicted by the second: 2 to compute, and 2 blocks to fetch; 2 went out."""
    workload = work((0.0, 10, 1), (5.0, 31, 1), (20.0, 10, 1), prefix=[3, 4, 3], prefix_tokens=8)
    costs = StepCosts(prefill_token=0.1, block_out=0.001, block_in=0.01)
    first, _, result = run(workload, costs, num_blocks=9, swap_blocks=9)
    assert first == [pytest.approx(1.0), pytest.approx(8.102), pytest.approx(20.222)]
    assert (result.stats["swapped_in_blocks"], result.stats["cpu_hit_tokens"]) == (2, 8)
    assert run(workload, costs, num_blocks=9)[0][2] == pytest.approx(21.0)


def test_requests_that_share_nothing_never_meet_in_the_cache() -> None:
    workload = work(*((float(i), 40, 2) for i in range(300)))
    assert run(workload)[2].stats["cached_prompt_tokens"] == 0


def test_deadlines_refusals_and_prompts_that_are_too_long() -> None:
    workload = work((0.0, 4, 50), (0.25, 4, 9), (0.25, 4, 9), (0.25, 4, 9), (0.5, 64, 1), timeout=3.5)
    first, finish, result = run(workload, max_num_seqs=1, max_waiting_requests=2)
    assert first == [1.0, -1, -1, -1, -1] and finish == [-1] * 5
    assert result.ends == {"overloaded": 1, "prompt_too_long": 1, "deadline": 3}
    assert result.seconds == 5.0, "the steps in flight at 3.5 come back, and the deadlines of others keep nobody here"


def test_priorities_reach_the_core() -> None:
    workload = work((0.0, 4, 3), (0.25, 4, 1), (0.5, 4, 1), priority=[0, 1, 0])
    first, _, _ = run(workload, max_num_seqs=1)
    assert first[2] < first[1]


class Verified:
    """Every plan is also executed by the fake engine, which finds wrong ones, and whose tokens are taken; and by the
    simulated engine, which must find in it what the core says of it."""

    core: Core

    def __init__(self, config: CoreConfig) -> None:
        self._fake = FakeEngine(config, cost=lambda tokens, rows: 1000 * tokens + rows)
        self._simulated = SimulatedEngine(config)

    def answer(self, plan: StepPlan, samples: int) -> bytes:
        executed = self._simulated.run(plan)
        assert (executed.shape, executed.samples) == (self.core.last_shape, samples)
        result = self._fake.run(plan)
        assert len(result.tokens) == 4 * samples, "another number of rows samples"
        tokens, rows = divmod(result.elapsed_us, 1000)
        shape = executed.shape
        assert (shape.prefill_tokens + shape.decode_rows, len(plan.rows) // 4) == (tokens, rows)
        return result.tokens


@pytest.mark.parametrize("seed", range(6))
def test_the_simulated_replica_does_what_plans_say(seed: int) -> None:
    """With preemptions, shared prefixes, chunks; every request ends with all its tokens, the first one noted once."""
    chosen = config(
        num_blocks=24,
        max_num_batched_tokens=20,
        max_prefill_chunk=[None, 3][seed % 2],
        pipeline_depth=1 + seed % 3,
        reserve_output="none",
        watermark=0.0,
        policy=["fair", "fcfs", "prefix"][seed % 3],
        swap_blocks=[0, 30][seed // 3],
        preemption=["auto", "swap"][seed // 3],
    )
    workload = random_work(seed, 60, 30, prefixes=(-1, 0, 1))
    verified = Verified(chosen)
    replica = Replica(chosen, SECOND, workload, answers=verified)
    verified.core = replica.core
    result = replica.run()
    replica.core.check()
    first, finish = np.frombuffer(result.first), np.frombuffer(result.finish)
    assert result.ends == {"length": 60} and result.stats["preemptions"] > 0
    assert (first > workload.arrival).all() and (finish > first + workload.outputs - 1.001).all()
    assert ((finish == first) == (workload.outputs == 1)).all()
    assert result.stats["generated_tokens"] == workload.outputs.sum()
    assert (result.stats["swapped_in_blocks"] > 0) == (seed >= 3)
    plain = Replica(chosen, SECOND, workload).run()
    assert (plain.first, plain.finish) == (result.first, result.finish), "which tokens they are makes no difference"


def test_events_at_one_time_have_an_order() -> None:
    """At 1 the first request ends, so the second leaves the queue, in which then is room for the third."""
    workload = work((0.0, 4, 1), (0.5, 4, 1), (1.0, 4, 1))
    narrow = partial(run, max_num_seqs=1, max_waiting_requests=1, pipeline_depth=1)
    first, _, result = narrow(workload)
    assert (first, result.ends) == ([1.0, 2.0, 3.0], {"length": 3})
    # A token that comes at the deadline comes too late, and whoever waits until then makes room for an arrival.
    first, finish, result = narrow(work((0.0, 4, 2), (0.0, 4, 1), timeout=[2.0, 0]))
    assert (first, finish, result.ends) == ([1.0, 3.0], [-1.0, 3.0], {"deadline": 1, "length": 1})
    first, _, result = narrow(work((0.0, 4, 3), (0.5, 4, 1), (1.5, 4, 1), timeout=[0, 1.0, 0]))
    assert (first, result.ends) == ([1.0, -1.0, 4.0], {"length": 2, "deadline": 1})


def test_histogram_is_exact_to_two_percent() -> None:
    histogram = Histogram()
    for milliseconds in range(1, 1001):
        histogram.add(milliseconds / 1000, 2)
    other = Histogram()
    other.merge(histogram)
    for percent in (10, 50, 99):
        assert other.percentile(percent) == pytest.approx(percent / 100, rel=0.02)
    assert other.mean() == pytest.approx(0.5005, rel=0.02)
    assert [other.share_within(s) for s in (0.0, 0.25, 5.0)] == pytest.approx([0.0, 0.25, 1.0], abs=0.01)
    assert Histogram().percentile(50) == Histogram().mean() == 0.0 and Histogram().share_within(1.0) == 1.0
    other.add(0.0, 1)
    other.add(1e9, 1)


def test_a_timeline_stays_short_and_at_its_times() -> None:
    line = Timeline()
    for second in range(1, 1001):
        line.add(second, Moment(second, 0, 0, 0, 0))  # the state before this second
    assert len(line.moments) < 512 and line.width == 2.0
    assert [moment.running for moment in line.moments[:3]] == [2, 4, 6]
    assert [moment.running for moment in line.at_width(8.0)[:3]] == [8, 16, 24]
