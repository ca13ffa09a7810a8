"""Bounds by tenant, retry-after, and admission that looks ahead."""

from __future__ import annotations

import numpy as np
import pytest

from tests.corekit import Rig, config
from tests.scriptkit import script
from treadle.errors import ConfigError, Overloaded
from treadle.scheduler.output_lengths import OutputLengths
from treadle.scheduler.rates import Rate


def test_a_tenant_has_bounds_of_its_own() -> None:
    rig = Rig(config(max_num_seqs=1, max_tenant_requests=2, max_tenant_tokens=20))
    rig.add("runs", [1])
    rig.plan()
    rig.add("a1", list(range(12)), tenant="a")
    rig.add("a2", [1, 2], tenant="a")
    with pytest.raises(Overloaded, match="2 requests of tenant 'a' with 14 tokens are waiting; at most 2 requests and"):
        rig.add("a3", [1], tenant="a")
    rig.add("b1", list(range(40)), tenant="b")  # nothing of it waits: it is taken, whatever its size
    with pytest.raises(Overloaded, match="tenant 'b'"):
        rig.add("b2", [1], tenant="b")
    rig.add("c", [1])
    rig.abort("runs")
    rig.plan()
    rig.add("a3", [1], tenant="a")
    rig.drain()
    assert not rig.core._waiting.tenants


def test_who_surely_gets_a_row_does_not_count_under_the_bound_of_its_tenant() -> None:
    rig = Rig(config(max_num_seqs=4, max_tenant_requests=1, max_tenant_tokens=30))
    for i in range(3):
        rig.add(f"a{i}", [1, i], tenant="a")
    rig.add("b", [1], tenant="b")  # a row is left for it, or for another of "a"
    rig.add("a3", [1], tenant="a")
    said = r"4 requests of tenant 'a' with 7 tokens are waiting \(rows for them: 3\); at most 1 requests over these"
    with pytest.raises(Overloaded, match=said):
        rig.add("a4", [1], tenant="a")
    rig.step()  # four of the five have rows
    assert rig.core.stats().waiting == 1
    with pytest.raises(Overloaded, match="1 requests of tenant 'a' with 1 tokens are waiting; at most 1 requests and"):
        rig.add("a5", [1], tenant="a")
    rig.drain()
    rig.add("long", [1] * 25, tenant="a")
    with pytest.raises(Overloaded, match=r"25 tokens are waiting \(rows for them: 4\)"):  # tokens count nevertheless
        rig.add("longer", [1] * 6, tenant="a")
    rig.drain()


def test_a_free_row_is_nobodys_while_the_budget_of_a_step_keeps_somebody_waiting() -> None:
    rig = Rig(config(max_num_seqs=8, max_num_batched_tokens=16, max_tenant_requests=1))
    for i in range(3):
        rig.add(f"a{i}", [i] * 40, tenant="a")
    rig.step()
    assert (rig.core.stats().running, rig.core.stats().waiting) == (1, 2)
    with pytest.raises(Overloaded, match="2 requests of tenant 'a' with 80 tokens are waiting; at most 1 requests are"):
        rig.add("a3", [1], tenant="a")
    rig.drain()


def test_the_bound_of_everybody_holds_for_each_tenant() -> None:
    rig = Rig(config(max_num_seqs=2, max_waiting_requests=0, max_tenant_requests=2))
    rig.add("a", [1], tenant="a")
    rig.add("b", [1], tenant="b")
    said = r"2 requests with 2 tokens are waiting \(rows for them: 2\); at most 0 requests over these rows and"
    with pytest.raises(Overloaded, match=said):
        rig.add("c", [1], tenant="c")


def test_retry_after_goes_by_the_rate_of_the_tenant_that_is_refused() -> None:
    rig = Rig(config(max_tenant_requests=1, max_num_seqs=1))
    for i in range(8):
        rig.add(f"slow {i}", [1, i], max_tokens=1, tenant="slow")
        rig.now += 2.0
        rig.step()
    rig.add("busy", [1], max_tokens=30, ignore_eos=True)
    rig.step()
    rig.add("waits", [1], tenant="slow")
    rig.now += 2.0
    with pytest.raises(Overloaded) as caught:
        rig.add("refused", [1], tenant="slow")
    assert caught.value.retry_after == pytest.approx(2.0)


def test_the_rate_counts_requests_and_tokens() -> None:
    rate = Rate()
    assert rate.seconds(5, 0, 1.0) == 1.0  # nothing is known
    for i in range(100):
        rate.note(float(i), 10 if i >= 36 else 10_000)  # only the last 64 count
    assert rate.seconds(3, 0, 100.0) == pytest.approx(3.0)
    assert rate.seconds(1, 200, 100.0) == pytest.approx(20.0)
    assert rate.seconds(10_000, 0, 100.0) == 60.0 and rate.seconds(1, 0, 36.5) == 0.05


@pytest.mark.parametrize(
    "wrong",
    [{"max_tenant_requests": 0}, {"max_tenant_tokens": -1}, {"watermark": 0.6}, {"reserve_output": "some"}],
)
def test_bounds_that_make_no_sense(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        config(**wrong)


# ── how long outputs are ──


def survival(lengths: OutputLengths, tenant: str, there: int, ahead: int) -> float:
    slot = np.array([lengths.slot(tenant)])
    now, then = np.array([there], np.int32), np.array([ahead], np.int32)
    return float(lengths.outlook(slot, now).survival(slot, now, then)[0, 0])


def test_output_lengths_are_learned_by_tenant() -> None:
    lengths, random = OutputLengths(4096), np.random.default_rng(0)
    for length in (random.pareto(1.2, 3_000) * 50 + 50).astype(int).clip(1, 4000).tolist():
        lengths.note("long tail", length)
        lengths.note("short", 10)
    assert survival(lengths, "short", 0, 20) < 0.1 < 0.9 < survival(lengths, "short", 0, 8)
    # Pareto: P(L > 200 | L > 100) = 2 ** -1.2, and the longer it goes on the longer it will
    assert survival(lengths, "long tail", 100, 100) == pytest.approx(2**-1.2, abs=0.12)
    assert survival(lengths, "long tail", 400, 100) > survival(lengths, "long tail", 60, 100)


def test_a_tenant_that_is_not_known_is_like_everybody() -> None:
    lengths = OutputLengths(1000)
    for _ in range(50):
        lengths.note("a", 30)
    assert lengths.slot("new") == 0 and survival(lengths, "new", 0, 25) > 0.9 > 0.2 > survival(lengths, "new", 0, 60)


def test_outputs_that_still_run_count() -> None:
    """Ten of a hundred have ended, all of them short: that is no reason to expect short ones."""
    lengths = OutputLengths(4096)
    for _ in range(10):
        lengths.note("a", 20)
    slots, now = np.full(90, lengths.slot("a")), np.full(90, 200, np.int32)
    outlook = lengths.outlook(slots, now)
    start, ahead = np.zeros(1, np.int32), np.array([100], np.int32)
    assert 0.8 < float(outlook.survival(slots[:1], start, ahead)[0, 0]) < 0.95
    assert survival(lengths, "a", 0, 100) < 0.3


def test_there_is_room_for_any_number_of_tenants_and_lengths() -> None:
    lengths = OutputLengths(64)
    for i in range(1000):
        lengths.note(f"tenant {i}", 1 + i % 64)
        assert 0 <= survival(lengths, f"tenant {i}", i % 65, 1 << 20) <= 1
    assert len(lengths._slots) < 256


# ── what admission leaves free ──


def test_the_watermark_stays_free_while_something_runs() -> None:
    rig = Rig(config(num_blocks=21, watermark=0.5, pipeline_depth=1))
    rig.add("a", list(range(30)), max_tokens=1, ignore_eos=True)  # alone it may take what it wants
    rig.add("b", [60] * 8, max_tokens=2, ignore_eos=True)
    rig.add("c", [70] * 8, max_tokens=2, ignore_eos=True)
    assert len(rig.must_plan().start) == 2  # 8 + 2 of 20 blocks, and 10 are left
    rig.apply()
    rig.drain()


def test_reserving_everything_never_preempts() -> None:
    rig = Rig(config(num_blocks=17, reserve_output="full", prefix_cache=False))
    for i in range(12):
        rig.add(str(i), [i] * (1 + 3 * i % 14), max_tokens=3 + 5 * i % 21, ignore_eos=True)
    rig.drain()
    assert rig.core.stats().preemptions == 0


def test_one_that_was_held_back_is_looked_at_again_when_somebody_stops() -> None:
    rig = Rig(config(num_blocks=11, reserve_output="full", pipeline_depth=1))
    rig.add("a", [1] * 4, max_tokens=20, ignore_eos=True)
    rig.add("b", [2] * 4, max_tokens=20, ignore_eos=True)
    rig.step()
    assert (rig.core.stats().running, rig.core.stats().waiting) == (1, 1)
    rig.abort("a")
    assert len(rig.must_plan().start) == 1
    rig.apply()
    rig.drain()


def test_looking_ahead_is_better_than_nothing_and_than_everything() -> None:
    """Heavy-tailed outputs in a tight cache, in virtual time: deterministic."""
    compare = script("compare_admission")
    outcomes = compare.compare(requests=200, blocks=301, seed=0)
    none, estimate, full = outcomes["none"], outcomes["estimate"], outcomes["full"]
    assert none.preemptions >= 1.5 * estimate.preemptions
    assert none.recomputed_tokens >= 1.5 * estimate.recomputed_tokens
    assert estimate.rows >= 2 * full.rows and estimate.seconds <= full.seconds / 2
    assert estimate.rows >= 0.9 * none.rows
    assert full.preemptions == 0
