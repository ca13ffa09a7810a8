"""Each policy keeps the promise of its docstring, whatever comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corekit import Rig, config
from tests.policykit import step, waiting
from treadle.errors import ConfigError, DeadlineUnreachable
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import CostModel, StepCosts
from treadle.scheduler.policies import (
    DeadlinePolicy,
    FairPolicy,
    FcfsPolicy,
    PrefixPolicy,
    PriorityPolicy,
    Ticket,
    View,
    make_policy,
)
from treadle.scheduler.policies.deadline import least_seconds
from treadle.transport.codec import pack
from treadle.transport.messages import SamplingParams, Submit

SMALL = config(num_blocks=17, max_num_seqs=3, max_num_batched_tokens=16, pipeline_depth=1)
COSTS = StepCosts(step=0.01, prefill_token=0.002, decode_row=0.001, context_token=1e-5, chunk_pair=1e-6)
quick = settings(max_examples=25, deadline=None)

arrivals = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.0, 1.0, 7.0]),  # seconds after the one before
        st.integers(-2, 2),  # priority
        st.integers(1, 20),  # prompt
        st.integers(1, 8),  # output
        st.integers(0, 2),  # steps in between
    ),
    min_size=4,
    max_size=14,
)


def follow(rig: Rig, requests: list[tuple[float, int, int, int, int]]) -> list[tuple[Ticket, dict[int, Ticket]]]:
    """Lets them arrive and run to the end: who started for the first time, with who waited then, in order."""
    history: list[tuple[Ticket, dict[int, Ticket]]] = []
    seen: set[int] = set()

    def watch() -> None:
        rig.expire()
        before = waiting(rig)
        for ticket in step(rig):
            if ticket.number not in seen:
                history.append((ticket, dict(before)))
            seen.add(ticket.number)
            del before[ticket.number]

    for serial, (gap, priority, prompt, output, steps) in enumerate(requests):
        rig.now += gap
        tokens = [(serial * 7 + i) % 100 for i in range(prompt)]
        rig.add(str(serial), tokens, priority=priority, max_tokens=output, ignore_eos=True, tenant="ab"[serial % 2])
        for _ in range(steps):
            watch()
    while rig.core.has_work:
        watch()
    return history


@given(arrivals)
@quick
def test_fcfs_starts_in_order_of_arrival(requests: list[tuple[float, int, int, int, int]]) -> None:
    history = follow(Rig(SMALL, FcfsPolicy()), requests)
    numbers = [ticket.number for ticket, _ in history]
    assert numbers == sorted(numbers)


@given(arrivals)
@quick
def test_priority_is_overtaken_only_for_so_long(requests: list[tuple[float, int, int, int, int]]) -> None:
    ageing = 5.0
    for ticket, waited in follow(Rig(SMALL, PriorityPolicy(ageing)), requests):
        for other in waited.values():
            if other.number < ticket.number:  # was overtaken
                assert ticket.priority < other.priority
                assert ticket.arrival - other.arrival <= (other.priority - ticket.priority) * ageing


def test_priority_ages() -> None:
    rig = Rig(config(max_num_seqs=1, pipeline_depth=1), PriorityPolicy(ageing=10.0))
    rig.add("first", [1], max_tokens=3, ignore_eos=True)
    rig.step()
    rig.add("low", [2], priority=2, max_tokens=1)
    for i in range(4):
        rig.now += 9.0
        rig.add(f"high {i}", [3, i], max_tokens=1)
    rig.drain()
    assert [name for name, _ in rig.finish] == ["first", "high 0", "high 1", "low", "high 2", "high 3"]


@given(arrivals, st.lists(st.sampled_from([0.0, 3.0, 30.0, 300.0]), min_size=14, max_size=14))
@quick
def test_deadline_goes_by_the_earliest(requests: list[tuple[float, int, int, int, int]], timeouts: list[float]) -> None:
    rig, policy = Rig(SMALL, DeadlinePolicy(patience=20.0)), DeadlinePolicy(patience=20.0)
    add = rig.add
    rig.add = lambda name, prompt, **more: add(name, prompt, timeout=timeouts[int(name)], **more)  # type: ignore
    for ticket, waited in follow(rig, requests):
        assert all(
            (policy.key(ticket, 0.0), ticket.number) <= (policy.key(other, 0.0), other.number)
            for other in waited.values()
            if other is not ticket
        )


def test_deadlines_that_cannot_be_met_are_refused_at_once_or_when_they_become_so() -> None:
    rig = Rig(config(max_num_seqs=1, pipeline_depth=1), DeadlinePolicy(), CostModel(COSTS))
    alone = 0.01 + 20 * 0.002 + 20 * 21 / 2 * 1e-6 + 9 * (0.01 + 0.001) + sum(range(21, 30)) * 1e-5
    submit = dict(max_tokens=10, ignore_eos=True)
    with pytest.raises(DeadlineUnreachable, match="takes longer even if it begins now, alone"):
        rig.add("never", list(range(20)), timeout=alone * 0.99, **submit)  # type: ignore[arg-type]
    assert not rig.core.has_work and rig.core.stats().refused == 1
    rig.add("runs", list(range(30, 50)), max_tokens=30, ignore_eos=True)
    rig.step()
    rig.add("waits", list(range(20)), timeout=alone + 1.0, **submit)  # type: ignore[arg-type]
    assert rig.core.next_deadline() == pytest.approx(1.0)
    rig.now = 0.99
    assert not rig.expire()
    rig.now = 1.01
    (output,) = rig.expire()
    assert (output.finish, output.error_code) == ("error", DeadlineUnreachable.code)
    assert output.sequence.request.id == "waits" and rig.core.next_deadline() is None
    rig.drain()


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 10), st.floats(0.01, 2.0)), min_size=1, max_size=8),
    st.booleans(),
)
@quick
def test_nobody_is_refused_who_could_have_met_the_deadline(
    requests: list[tuple[int, int, float]], cached: bool
) -> None:
    """With the true costs: refused exactly when even alone on the machine it would be too late."""
    for prompt, output, timeout in requests:
        rig = Rig(config(pipeline_depth=1), DeadlinePolicy(), CostModel(COSTS))
        if cached:
            rig.add("warm", list(range(prompt)), max_tokens=1)
            rig.drain()
        began = rig.now
        try:
            rig.add("it", list(range(prompt)), timeout=timeout, max_tokens=output, ignore_eos=True)
            refused = False
        except DeadlineUnreachable:
            refused = True
            rig.add("it", list(range(prompt)), max_tokens=output, ignore_eos=True)
        while rig.core.has_work:
            assert rig.plan() is not None
            rig.now += rig.core.costs.predict(rig.core.last_shape)
            rig.apply()
        ran = rig.finish["it", 0].finish == "length"
        assert refused == (rig.now - began > timeout) or abs(rig.now - began - timeout) < 1e-9
        assert ran or not refused


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 16)), min_size=30, max_size=40),
    st.integers(0, 60),
    st.sampled_from([{}, {"small": 3.0}]),
    st.integers(2, 5),
)
@settings(max_examples=8, deadline=None)
def test_fair_service_of_two_backlogged_tenants_stays_close(
    lengths: list[tuple[int, int]], late: int, weights: dict[str, float], flood: int
) -> None:
    """However many requests one sends, and however long the other was idle before: the theorem of the docstring."""
    rig = Rig(SMALL, FairPolicy(weights))
    cache = (SMALL.num_blocks - 1) * SMALL.block_size
    bound = 2 * max(12.0, 2.0 * cache) / min(1.0, *weights.values(), 1.0)
    service = {"flood": 0.0, "small": 0.0}
    prompts: dict[str, tuple[str, int]] = {}
    charged: set[str] = set()

    def send(tenant: str, name: str, prompt: int, output: int) -> None:
        prompts[name] = tenant, prompt
        tokens = [(len(prompts) * 13 + i * i) % 100 for i in range(prompt)]
        rig.add(name, tokens, tenant=tenant, max_tokens=output, ignore_eos=True, salt=name)

    def advance() -> None:
        before = {key: len(tokens) for key, tokens in rig.tokens.items()}
        for ticket in step(rig):
            if ticket.request_id not in charged:
                charged.add(ticket.request_id)
                service[ticket.tenant] += ticket.prompt_tokens / weights.get(ticket.tenant, 1.0)
        for key, tokens in rig.tokens.items():
            tenant = prompts[key[0]][0]
            service[tenant] += 2.0 * (len(tokens) - before[key]) / weights.get(tenant, 1.0)

    for i, (prompt, output) in enumerate(lengths * flood):
        send("flood", f"flood {i}", prompt, output)
    for _ in range(late):
        advance()
    for i, (prompt, output) in enumerate(lengths):
        send("small", f"small {i}", prompt, output)
    gaps = []
    while {ticket.tenant for ticket in waiting(rig).values()} == {"flood", "small"}:
        gaps.append(service["flood"] - service["small"])
        advance()
    assert max(gaps, default=0.0) - min(gaps, default=0.0) <= bound
    assert not {t.tenant for t in waiting(rig).values()} or len(gaps) > 5, "they were not backlogged together"


def test_fair_takes_from_the_tenant_that_got_most() -> None:
    policy = FairPolicy()
    policy.charge("a", 100, 0)
    policy.charge("b", 10, 5)
    rig = Rig(SMALL)
    tickets = [rig.add(name, [1], tenant=name[1]).sequences[0].ticket for name in ("xa", "ya", "zb")]
    assert policy.victim(tuple(tickets), rig.core._waiting.view(0.0)) is tickets[1]  # the youngest of "a"


def test_fair_forgets_tenants_and_stays_small() -> None:
    policy = FairPolicy()
    for i in range(10_000):
        policy.opens(str(i), 5.0)
        policy.charge(str(i), 1, 1)
        policy.closes(str(i))
    assert len(policy._counters) <= 4096 and policy.lane_key("9999") == 8.0


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 5)), min_size=6, max_size=18),
    st.integers(0, 3),
)
@quick
def test_prefix_overtakes_the_oldest_no_more_often_than_it_says(
    requests: list[tuple[int, int, int]], patience: int
) -> None:
    prefixes = [[], [1] * 8, [2] * 12, [3] * 16]
    rig = Rig(config(num_blocks=33, max_num_seqs=2, pipeline_depth=1), PrefixPolicy(window=6, patience=patience))
    for serial, (prefix, own, output) in enumerate(requests):
        prompt = prefixes[prefix] + [50 + (serial + i) % 50 for i in range(own)]
        rig.add(str(serial), prompt, max_tokens=output, ignore_eos=True)
    overtaken: dict[int, int] = {}
    while rig.core.has_work:
        before = waiting(rig)
        for ticket in step(rig):
            oldest = min(before)
            if ticket.number > oldest:
                overtaken[oldest] = overtaken.get(oldest, 0) + 1
                assert overtaken[oldest] <= patience
            del before[ticket.number]


def test_prefix_runs_those_with_a_cached_prefix_together() -> None:
    rig = Rig(config(max_num_seqs=1, pipeline_depth=1), PrefixPolicy())
    shared = list(range(20))
    rig.add("a", [*shared, 90], max_tokens=2, ignore_eos=True)
    rig.step()
    for name, prompt in (("x", [60] * 8), ("b", [*shared, 91]), ("y", [70] * 8), ("c", [*shared, 92])):
        rig.add(name, prompt, max_tokens=2, ignore_eos=True)
    rig.drain()
    assert [name for name, _ in rig.finish] == ["a", "b", "c", "x", "y"]


class Counting(FairPolicy):
    """Counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def lane_key(self, lane: str) -> float:
        self.asked += 1
        return super().lane_key(lane)


def test_a_step_looks_only_at_the_head_of_a_long_queue() -> None:
    """8,000 wait for 500 tenants: nobody asks about all of them, and steps with full rows ask nothing."""
    policy = Counting()
    core = Core(config(max_waiting_requests=1 << 20, max_waiting_tokens=1 << 40, num_blocks=4000), lambda: 1, policy)
    params, prompt = SamplingParams(max_tokens=1), pack([1, 2, 3])
    for i in range(8_000):
        core.add(Submit(id=str(i), tokens=prompt, params=params, tenant=str(i % 500)), 0.0)
    assert core.plan(0.0) is not None
    opening, policy.asked = policy.asked, 0
    assert opening <= 3 * 500 + 50  # each lane once when it opens, and the head
    assert core.plan(0.0) is None and policy.asked == 0, "rows are full, there is nothing to ask"
    names = list(core._unfinished.requests)[: 8_000 - 8]
    for name in names[:8]:
        core.abort(name, 0.0)
    core.plan(0.0)
    assert policy.asked <= 60


def test_policies_by_name() -> None:
    for name in ("fcfs", "priority", "deadline", "fair", "prefix"):
        assert make_policy(name).name == name
    with pytest.raises(ConfigError, match="policy='best': allowed are deadline, fair, fcfs"):
        config(policy="best")


@pytest.mark.parametrize(
    "make",
    [
        lambda: PriorityPolicy(float("nan")),
        lambda: PriorityPolicy(-1.0),
        lambda: DeadlinePolicy("1"),  # type: ignore[arg-type]
        lambda: FairPolicy({"a": 0.0}),
        lambda: FairPolicy(prompt_weight=True),
        lambda: PrefixPolicy(window=0),
        lambda: PrefixPolicy(patience=-1),
    ],
)
def test_senseless_settings_of_policies_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        make()  # type: ignore[operator]


def test_least_seconds_counts_what_is_cached() -> None:
    rig = Rig(config(), DeadlinePolicy(), CostModel(COSTS))
    view = rig.core._waiting.view(0.0)
    ticket = rig.add("a", list(range(20)), max_tokens=1).sequences[0].ticket
    whole = least_seconds(ticket, view)
    half = least_seconds(ticket, View(0.0, 0, 0, 64, 64, COSTS, lambda _: 16))
    assert whole == pytest.approx(0.01 + 20 * 0.002 + 210e-6) and half == pytest.approx(0.01 + 4 * 0.002 + 74e-6)


def test_the_policy_of_the_documentation_works() -> None:
    """The first two blocks of docs/policies.md as they stand, and the policy among random arrivals' sizes."""
    text = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names: dict[str, Any] = {"__name__": "documentation"}
    exec(compile(blocks[0] + blocks[1], "docs/policies.md", "exec"), names)
    compile(blocks[2], "docs/policies.md", "exec")
    rig = Rig(config(num_blocks=9, max_num_seqs=3), names["ShortestFirst"]())
    for i in range(8):
        rig.add(str(i), [i] * (1 + i), max_tokens=20 - i, ignore_eos=True)
    rig.drain()
    assert rig.core.policy_errors == 0 and rig.core.stats().preemptions
