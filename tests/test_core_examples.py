"""The scheduler core, one behaviour at a time. (Everything at once: test_core_machine.py.)"""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from tests.corekit import Rig, config, counts
from treadle.errors import ConfigError, InvalidParameter, InvalidRequest, Overloaded, PromptTooLong, ProtocolError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import CoreInvariantError
from treadle.scheduler.request import derive_seed
from treadle.scheduler.rows import span
from treadle.transport.codec import pack, unpack
from treadle.transport.messages import RowFault, RowStart, SamplingParams, StepResult, Submit


def text(length: int, start: int = 0) -> list[int]:
    """A prompt that shares no block with one of another start."""
    return [(start * 31 + 7 * i + i * i) % 100 for i in range(length)]


# ── coming in ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("prompt", "error", "says"),
    [
        ([], InvalidRequest, "empty"),
        ([1, 100], InvalidRequest, "token 100 at position 1"),
        ([-1], InvalidRequest, r"\[0, 100\)"),
        ([1] * 64, PromptTooLong, "at most 63 are allowed"),
    ],
)
def test_bad_prompts_say_what_is_allowed(prompt: list[int], error: type[Exception], says: str) -> None:
    rig = Rig()
    with pytest.raises(error, match=says):
        rig.add("bad", prompt)
    assert not rig.core.has_work and rig.core.stats().refused == 1
    rig.add("good", [1] * 63)
    rig.drain()


@pytest.mark.parametrize("field", [{"timeout": float("nan")}, {"timeout": -1.0}, {"priority": 1 << 40}, {"n": 0}])
def test_bad_numbers(field: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(field))):
        Rig().add("bad", [1], **field)  # type: ignore[arg-type]


def test_a_pool_smaller_than_the_context_bounds_the_prompt() -> None:
    rig = Rig(config(num_blocks=4))
    with pytest.raises(PromptTooLong, match="at most 11 are allowed"):
        rig.add("long", [1] * 12)
    rig.add("fits", [1] * 11, max_tokens=None)
    rig.drain()
    assert rig.finish["fits", 0].finish == "length"


def test_an_id_can_be_used_again_after_the_end_and_not_before() -> None:
    rig = Rig()
    rig.add("same", [1, 2], max_tokens=1)
    with pytest.raises(InvalidRequest, match="same"):
        rig.core.add(Submit(id="same", tokens=pack([1]), params=SamplingParams()), 0.0)
    rig.drain()
    rig.core.add(Submit(id="same", tokens=pack([1]), params=SamplingParams()), 0.0)


def test_the_queue_is_bounded_in_requests_and_tokens() -> None:
    rig = Rig(config(max_num_seqs=1, max_waiting_requests=2, max_waiting_tokens=50))
    rig.add("a", text(45))  # alone it is taken, whatever its size
    with pytest.raises(Overloaded, match="45 tokens"):
        rig.add("tokens", text(10))
    rig.add("b", [1])
    with pytest.raises(
        Overloaded, match=r"2 requests with 46 tokens are waiting \(rows for them: 1\); at most 2 requests over these"
    ):
        rig.add("c", [1], n=2)
    assert rig.core.stats().refused == 2
    rig.plan()
    rig.add("d", text(40))
    rig.drain()


def test_who_gets_a_row_in_the_next_step_does_not_count_as_waiting() -> None:
    rig = Rig(config(max_num_seqs=3, max_waiting_requests=1))
    for name in "abcd":
        rig.add(name, [1], max_tokens=9, ignore_eos=True)
    for _ in range(2):  # before they have their rows and after
        with pytest.raises(Overloaded, match="at most 1 requests"):
            rig.add("e", [1])
        rig.step()
    rig.abort("a")
    with pytest.raises(Overloaded):
        rig.add("e", [1], n=2)
    rig.add("e", [1])
    rig.drain()


def test_where_nobody_may_wait_as_many_are_taken_as_there_are_rows() -> None:
    rig = Rig(config(max_num_seqs=2, max_waiting_requests=0))
    rig.add("both", [1], n=2, max_tokens=9, ignore_eos=True)
    before = "2 requests with 2 tokens are waiting (rows for them: 2); at most 0 requests over these rows and"
    for said in (before, "0 requests with 0 tokens are waiting; at most 0 requests and"):
        with pytest.raises(Overloaded, match=re.escape(said)):
            rig.add("third", [1])
        rig.step()
    rig.abort("both", 1)
    rig.add("third", [1], max_tokens=9, ignore_eos=True)
    rig.drain()
    rig.add("more than there are rows", [1], n=5)  # else it could never be taken
    rig.drain()


def one_blocked(**changes: object) -> Rig:
    """One runs, "a", and another waits for blocks, "b", though rows are free."""
    rig = Rig(config(num_blocks=12, block_size=4, reserve_output="full", **changes))
    rig.add("a", text(8), max_tokens=20, ignore_eos=True)
    rig.step()
    rig.add("b", text(20, 1), max_tokens=20, ignore_eos=True)
    rig.step()
    return rig


def test_rows_that_nobody_can_have_leave_no_room() -> None:
    """Rows are free and blocks are not: whoever comes now would wait, too."""
    rig = one_blocked(max_num_seqs=8, max_waiting_requests=2)
    assert rig.core.stats().waiting == 1
    rig.add("c", [1])
    with pytest.raises(Overloaded, match="at most 2 requests"):
        rig.add("d", [1])
    rig.drain()


def test_room_comes_back_when_whoever_was_blocked_is_gone() -> None:
    rig = one_blocked(max_num_seqs=8, max_waiting_requests=0)
    with pytest.raises(Overloaded):
        rig.add("c", [1])
    rig.abort("b")
    for name in "cd":
        rig.add(name, [1], max_tokens=1)
    rig.drain()


def test_where_nobody_may_wait_there_must_be_blocks_too() -> None:
    rig = Rig(config(num_blocks=12, block_size=4, max_num_seqs=8, max_waiting_requests=0))
    rig.add("a", text(36), max_tokens=20, ignore_eos=True)
    rig.step()
    rig.add("b", [1])
    with pytest.raises(Overloaded):
        rig.add("c", [1])
    rig.drain()


def test_the_death_of_the_engine_leaves_room_as_far_as_rows_go() -> None:
    rig = one_blocked(max_num_seqs=3, max_waiting_requests=1)
    with pytest.raises(Overloaded):
        rig.add("c", [1])
    rig.reset()
    rig.add("c", [1])
    rig.add("d", [1])
    with pytest.raises(Overloaded):
        rig.add("e", [1])
    rig.drain()


def test_what_another_core_had_accepted_is_under_no_bound() -> None:
    rig = Rig(config(max_num_seqs=1, max_waiting_requests=0, max_tenant_requests=1, max_waiting_tokens=5))
    for name in "abcd":
        rig.core.add(Submit(id=name, tokens=pack(text(4)), params=SamplingParams(max_tokens=2)), 0.0, bounded=False)
    with pytest.raises(Overloaded):
        rig.add("e", [1])
    assert rig.core.stats().waiting == 4


def test_retry_after_follows_the_rate_of_ends() -> None:
    rig = Rig(config(max_num_seqs=1, max_waiting_requests=0))
    for i in range(10):
        rig.add(str(i), text(3, i), max_tokens=1)
        rig.now += 0.5
        rig.step()
    rig.add("waits", [1])
    with pytest.raises(Overloaded) as caught:
        rig.add("refused", [1])
    assert caught.value.retry_after == pytest.approx(0.45)


@pytest.mark.parametrize(
    "wrong", [{"num_blocks": 1}, {"vocab_size": 0}, {"max_prefill_chunk": 0}, {"block_size": 0}, {"evict_ahead": -1}]
)
def test_a_senseless_config_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CoreConfig(**({"num_blocks": 10, "vocab_size": 10} | wrong))  # type: ignore[arg-type]


def test_a_256th_is_evicted_at_once_and_as_little_as_can_be_where_it_moves_to_host_memory() -> None:
    assert config(num_blocks=1025).evicted_at_once == 4
    assert config(num_blocks=1025, swap_blocks=1).evicted_at_once == 0
    assert config(num_blocks=1025, swap_blocks=1, evict_ahead=2).evicted_at_once == 2
    rig = Rig(config(num_blocks=11, max_model_len=40, evict_ahead=5))
    for i in range(4):  # each leaves three blocks that are cached and one that is blank
        rig.add(str(i), text(12, i), max_tokens=2)
        rig.drain()
    assert rig.core.stats().evictions == 5  # where two would have done


# ── what runs in a step ──────────────────────────────────────────────────────────────────────────────────────────────


def test_decodes_come_first_and_a_prompt_is_cut_to_what_is_left() -> None:
    rig = Rig(config(max_num_batched_tokens=10))
    rig.add("a", text(4, 1), ignore_eos=True, max_tokens=10)
    rig.step()
    rig.add("b", text(21, 2))
    assert list(counts(rig.must_plan()).values()) == [1, 9]
    rig.apply()
    assert list(counts(rig.must_plan()).values()) == [1, 9]
    rig.apply()
    assert list(counts(rig.must_plan()).values()) == [1, 3]
    rig.drain()


def test_chunks_are_no_longer_than_asked() -> None:
    rig = Rig(config(max_prefill_chunk=5))
    rig.add("a", text(12, 1))
    rig.add("b", text(7, 2))
    seen = [list(counts(rig.must_plan()).values()), list(counts(rig.must_plan()).values())]
    assert seen == [[5, 5], [5, 2]]
    rig.drain()


def test_first_come_first_served_and_nobody_overtakes() -> None:
    rig = Rig(config(num_blocks=9, pipeline_depth=1))
    rig.add("runs", text(16, 1), max_tokens=4)
    rig.step()
    rig.add("big", text(20, 2), max_tokens=2)
    rig.add("small", text(2, 3), max_tokens=2)
    assert len(rig.must_plan().start) == 0  # small would fit, but big is before it
    rig.drain()
    assert list(rig.finish) == [("runs", 0), ("big", 0), ("small", 0)]


def test_a_lower_priority_number_goes_first() -> None:
    rig = Rig(config(max_num_seqs=1))
    for name, priority in (("later", 5), ("usual", 0), ("first", -5)):
        rig.add(name, text(3, priority), priority=priority, max_tokens=2)
    rig.drain()
    assert [name for name, _ in rig.finish] == ["first", "usual", "later"]


def test_there_are_never_more_rows_than_the_budget_can_decode() -> None:
    rig = Rig(config(max_num_batched_tokens=3, max_prefill_chunk=1))
    for i in range(7):
        rig.add(str(i), [i, i], ignore_eos=True, max_tokens=4)
    rig.step()
    while rig.core.has_work:
        rig.plan()
        assert rig.core.stats().running <= 3
        rig.apply()


def test_the_pipeline_is_as_deep_as_asked_and_never_plans_past_the_limit() -> None:
    rig = Rig(config(pipeline_depth=2))
    rig.add("a", text(5), max_tokens=2, ignore_eos=True)
    rig.must_plan()
    rig.must_plan()
    assert rig.plan() is None and rig.core.in_flight == 2
    rig.apply()
    assert rig.plan() is None  # both of its tokens are under way
    rig.apply()
    assert not rig.core.has_work


def test_a_token_after_the_end_is_discarded_and_row_and_blocks_are_free_at_once() -> None:
    rig = Rig(config(num_blocks=4, max_num_seqs=1, eos_token_ids=()))
    first = rig.add("probe", text(6, 1), max_tokens=1)
    rig.drain()
    stop = rig.tokens["probe", 0][0]
    assert first.unfinished == 0
    rig.add("a", text(6, 1), stop_token_ids=[stop], max_tokens=None)
    rig.must_plan()
    rig.must_plan()  # plans the token after the one that will turn out to end it
    rig.add("b", text(9, 2), max_tokens=2)
    rig.apply()
    assert rig.finish["a", 0].stop_token == stop
    plan = rig.must_plan()
    assert unpack(plan.release).tolist() == [start.row for start in plan.start] == [0]
    assert rig.apply().tokens == []
    rig.drain()


# ── how it ends ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stop_ids_count_only_after_min_tokens_and_are_part_of_the_output() -> None:
    rig = Rig(config(vocab_size=3, eos_token_ids=(0,)))
    rig.add("a", [1], min_tokens=6, max_tokens=40)
    rig.drain()
    assert 0 not in rig.tokens["a", 0][:6]
    assert rig.tokens["a", 0][-1] == rig.finish["a", 0].stop_token == 0


def test_eos_can_be_ignored() -> None:
    rig = Rig(config(vocab_size=2, eos_token_ids=(0, 1)))
    rig.add("a", [1], ignore_eos=True, max_tokens=9)
    rig.add("b", [1], max_tokens=9)
    rig.drain()
    assert len(rig.tokens["a", 0]) == 9 and len(rig.tokens["b", 0]) == 1


def test_abort_anywhere() -> None:
    rig = Rig(config(max_num_seqs=2))
    for i in range(3):
        rig.add(str(i), text(9, i), n=2 if i == 0 else 1, ignore_eos=True, max_tokens=20)
    rig.must_plan()
    assert [output.finish for output in rig.abort("0", 1)] == ["abort"]
    assert rig.abort("0", 1) == [] and rig.abort("nobody") == [] and rig.abort("0", 7) == []
    rig.must_plan()
    assert len(rig.abort("2")) == 1 and len(rig.abort("0")) == 1
    rig.drain()
    assert rig.finish["1", 0].finish == "length"


def test_deadlines_end_what_runs_and_what_waits() -> None:
    rig = Rig(config(max_num_seqs=1))
    rig.add("runs", text(4, 1), timeout=5.0, max_tokens=50, ignore_eos=True)
    rig.add("waits", text(4, 2), timeout=3.0)
    rig.add("free", text(4, 3), max_tokens=2)
    rig.must_plan()
    assert rig.core.next_deadline() == 3.0
    rig.now = 3.0
    assert [output.sequence.request.id for output in rig.expire()] == ["waits"]
    assert rig.core.next_deadline() == 5.0
    rig.now = 6.0
    outputs = rig.apply()
    assert [output.finish for output in outputs.others] == ["deadline"] and not outputs.tokens
    assert rig.core.next_deadline() is None
    rig.drain()


def test_a_deadline_found_by_plan_is_told_soon() -> None:
    rig = Rig()
    rig.add("a", text(4), timeout=1.0)
    rig.now = 2.0
    assert rig.plan() is None
    assert rig.core.next_deadline() == 0.0
    assert [output.finish for output in rig.expire()] == ["deadline"]
    assert rig.core.next_deadline() is None


# ── sharing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_request_computes_only_what_is_new() -> None:
    rig = Rig()
    rig.add("a", text(18), max_tokens=1)
    rig.drain()
    request = rig.add("b", [*text(18), 50, 51], max_tokens=1)
    plan = rig.must_plan()
    assert plan.start[0].computed == 16 and list(counts(plan).values()) == [4]
    rig.drain()
    assert request.sequences[0].cached_tokens == 16
    stats = rig.core.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (38, 16)


def test_the_last_prompt_token_is_always_computed() -> None:
    rig = Rig()
    rig.add("a", text(16), max_tokens=1)
    rig.drain()
    rig.add("b", text(16), max_tokens=1)
    assert rig.must_plan().start[0].computed == 12
    rig.drain()


def test_generated_tokens_are_shared_too() -> None:
    rig = Rig()
    rig.add("a", text(6), max_tokens=12, ignore_eos=True)
    rig.drain()
    rig.add("turn 2", [*text(6), *rig.tokens["a", 0], 9], max_tokens=1)
    assert rig.must_plan().start[0].computed == 16
    rig.drain()


def test_continuations_share_the_prompt_in_the_very_same_step() -> None:
    rig = Rig()
    rig.add("a", text(17), n=4, max_tokens=8)
    plan = rig.must_plan()
    assert [start.computed for start in plan.start] == [0, 16, 16, 16]
    tables = [unpack(start.blocks).tolist() for start in plan.start]
    assert all(table[:4] == tables[0][:4] for table in tables) and len({table[4] for table in tables}) == 4
    assert rig.core.stats().blocks_used == 4 + 4
    rig.drain()
    assert len({tuple(rig.tokens["a", index]) for index in range(4)}) == 4


def test_continuation_zero_equals_the_request_alone() -> None:
    assert derive_seed(5, 0) == 5 and derive_seed(-1, 0) == 2**64 - 1
    assert len({derive_seed(5, index) for index in range(100)}) == 100


@pytest.mark.parametrize("how", ["salt", "off", "prompt_logprobs"])
def test_no_hit_where_none_is_allowed(how: str) -> None:
    rig = Rig(config(prefix_cache=how != "off"))
    rig.add("a", text(16), max_tokens=1)
    rig.drain()
    rig.add("b", text(16), salt="x" if how == "salt" else "", prompt_logprobs=0 if how == "prompt_logprobs" else None)
    assert rig.must_plan().start[0].computed == 0
    rig.drain()


# ── out of blocks ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_no_token(depth: int, prefix_cache: bool) -> None:
    rig = Rig(config(num_blocks=13, pipeline_depth=depth, prefix_cache=prefix_cache))
    for i in range(5):
        rig.add(str(i), text(6, i), max_tokens=30, ignore_eos=True, seed=i)
    rig.drain()
    assert rig.core.stats().preemptions > 0


def test_the_youngest_gives_way_and_resumes_from_the_cache() -> None:
    rig = Rig(config(num_blocks=9, pipeline_depth=1))
    rig.add("old", text(12, 1), max_tokens=12, ignore_eos=True)
    rig.add("young", text(12, 2), max_tokens=12, ignore_eos=True)
    while not rig.core.stats().preemptions:
        rig.step()
    resumed = [start for start in _plans_until(rig, "old") if start.prompt_len == 12]
    assert not resumed  # it does not come back while the older one needs the blocks
    start = rig.must_plan().start[0]
    assert len(start.tokens) // 4 > 12  # prompt and committed output
    rig.drain()
    assert list(rig.finish) == [("old", 0), ("young", 0)]


def _plans_until(rig: Rig, name: str) -> list[RowStart]:
    starts: list[RowStart] = []
    while (name, 0) not in rig.finish:
        starts += rig.must_plan().start
        rig.apply()
    return starts


# ── when the engine dies ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_goes_on_after_the_engine_died() -> None:
    rig = Rig()
    rig.add("a", text(10, 1), max_tokens=20, ignore_eos=True)
    rig.add("b", text(10, 2), max_tokens=20, ignore_eos=True)
    for _ in range(5):
        rig.step()
    rig.plan()
    assert rig.reset() == []
    assert (rig.core.in_flight, rig.core.stats().blocks_cached, rig.core.stats().waiting) == (0, 0, 2)
    start = rig.must_plan().start[0]
    assert unpack(start.tokens).tolist() == text(10, 1) + rig.tokens["a", 0]
    rig.drain()
    assert rig.core.stats().recoveries == 1


def test_the_request_that_kills_the_engine_fails_alone() -> None:
    rig = Rig(config(max_num_seqs=8))
    for i in range(6):
        rig.add(str(i), text(5, i), max_tokens=8, ignore_eos=True)
    deaths = 0
    while rig.core.has_work:
        while rig.plan() is not None:
            pass
        if any(start.tokens.startswith(pack(text(5, 3))) for plan in rig.plans for start in plan.start):
            rig.reset()  # request 3 kills whatever engine it is started on
            deaths += 1
            continue
        rig.apply()
    assert deaths == 3
    assert {key[0] for key, output in rig.finish.items() if output.finish == "error"} == {"3"}
    assert rig.finish["3", 0].error_code == "engine_failed"
    rig.drain()


def test_who_is_only_near_when_engines_die_goes_on() -> None:
    """One is on trial when a newcomer kills the engine: it is tried alone then, and the newcomer found."""
    rig = Rig(config(max_num_seqs=8, max_num_batched_tokens=64))
    rig.add("near", text(5, 1), max_tokens=8, ignore_eos=True)
    rig.must_plan()
    assert rig.reset() == []  # from outside
    rig.add("killer", text(5, 2), max_tokens=8, ignore_eos=True)
    together: list[int] = []
    while rig.core.has_work:
        while rig.plan() is not None:
            pass
        started = [start.tokens[:20] for plan in rig.plans for start in plan.start]
        if pack(text(5, 2)) in started:
            together.append(len(started))
            rig.reset()
        else:
            rig.apply()
    assert together == [2, 1, 1], "both on trial, then each alone"
    assert rig.finish["near", 0].finish == "length"
    assert rig.finish["killer", 0].error_code == "engine_failed"


def test_the_accused_is_tried_before_its_turn_and_alone() -> None:
    rig = Rig(config(max_num_seqs=8, max_num_batched_tokens=64))
    for name, n in (("a", 1), ("b", 1), ("c", 2)):
        rig.add(name, text(20, n), max_tokens=8, ignore_eos=True, n=n)
    rig.step()
    rig.plan()
    rig.reset()
    while rig.must_plan().start[0].params.n == 1:  # one after the other
        assert len(rig.plans[-1].start) == 1
        rig.apply()
    rig.reset()
    assert [start.params.n for start in rig.must_plan().start] == [2, 2], "the last on trial is first now"
    assert rig.plan() is None or not rig.plans[-1].start, "and nobody is beside it"
    rig.drain()
    assert {output.finish for output in rig.finish.values()} == {"length"}


def test_an_engine_that_dies_idle_is_nobodys_fault() -> None:
    rig = Rig(config(max_engine_failures=1))
    rig.add("a", text(5), max_tokens=5)
    rig.step()
    assert rig.reset() == []
    rig.must_plan()
    assert [output.finish for output in rig.reset()] == ["error"]
    rig.drain()


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_log_probabilities_go_to_whom_they_belong() -> None:
    rig = Rig(config(max_prefill_chunk=3, max_num_batched_tokens=8))
    rig.add("plain", text(4, 1), max_tokens=6, ignore_eos=True)
    rig.add("both", text(7, 2), max_tokens=6, ignore_eos=True, logprobs=1, prompt_logprobs=2)
    prompt_positions: list[int] = []
    positions: list[int] = []
    while rig.core.has_work:
        rig.plan()
        for output in rig.apply().others:
            if output.logprobs or output.prompt_logprobs:
                assert output.sequence.request.id == "both"
                assert [item.token_id for item in output.logprobs] == output.tokens
            positions += [item.position for item in output.logprobs]
            prompt_positions += [item.position for item in output.prompt_logprobs]
    assert prompt_positions == [1, 2, 3, 4, 5, 6] and positions == [7, 8, 9, 10, 11, 12]


def test_a_row_that_fails_fails_alone_and_serves_nobody() -> None:
    rig = Rig()
    rig.add("bad", text(9, 1), max_tokens=5)
    rig.add("good", text(9, 2), max_tokens=5)
    row = rig.must_plan().start[0].row
    result = rig.execute()
    outputs = rig.apply(msgspec.structs.replace(result, faults=[RowFault(row, "a bad bias")]))
    assert [(o.finish, o.error_code, o.error) for o in outputs.others] == [("error", "request_failed", "a bad bias")]
    rig.add("same prompt", text(9, 1), max_tokens=5)
    assert rig.must_plan().start[0].computed == 0
    rig.drain()


@pytest.mark.parametrize("wrong", ["step", "too few", "too many", "vocabulary", "negative", "bytes"])
def test_a_result_that_does_not_fit_changes_nothing(wrong: str) -> None:
    rig = Rig()
    rig.add("a", text(9), max_tokens=5)
    rig.must_plan()
    good = rig.execute()
    bad = {
        "step": msgspec.structs.replace(good, step=7),
        "too few": msgspec.structs.replace(good, tokens=b""),
        "too many": msgspec.structs.replace(good, tokens=good.tokens * 2),
        "vocabulary": msgspec.structs.replace(good, tokens=pack([100])),
        "negative": msgspec.structs.replace(good, tokens=pack([-1])),
        "bytes": msgspec.structs.replace(good, tokens=b"abc"),
    }[wrong]
    with pytest.raises(ProtocolError):
        rig.core.apply(bad, 0.0)
    rig.core.check()
    rig.apply(good)
    rig.drain()


def test_a_result_nobody_asked_for() -> None:
    with pytest.raises(ProtocolError, match="no step is in flight"):
        Rig().core.apply(StepResult(0, 0, 0, b"", 0), 0.0)


def test_a_steady_step_makes_no_objects_and_small_frames() -> None:
    rig = Rig(config(num_blocks=600, max_num_seqs=64, max_num_batched_tokens=512))
    for i in range(64):
        rig.add(str(i), text(5, i), ignore_eos=True, max_tokens=20)
    rig.step()
    plan = rig.must_plan()
    assert not plan.start and not plan.grow_rows and len(plan.rows) == 4 * 64
    outputs = rig.apply()
    assert len(outputs.tokens) == 64 and not outputs.others
    rig.drain()


def test_stats_count() -> None:
    rig = Rig()
    rig.add("a", text(8), max_tokens=3, ignore_eos=True)
    rig.step()
    stats = rig.core.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.generated_tokens) == (1, 0, 2, 1)
    assert stats.blocks_total == 64
    rig.drain()
    stats = rig.core.stats()
    assert (stats.running, stats.finished, stats.blocks_used, stats.blocks_cached) == (0, 1, 0, 2)


def test_check_finds_a_lost_block() -> None:
    rig = Rig()
    rig.add("a", text(8))
    rig.must_plan()
    rig.core._running.cache.pool.refs[1] += 1
    with pytest.raises(CoreInvariantError):
        rig.core.check()


@pytest.mark.parametrize("rows", [[0], [3], [2, 3, 4], [0, 1, 3], [1, 5]])
def test_the_span_of_rows_is_those_rows(rows: list[int]) -> None:
    at = span(np.array(rows, np.intp))
    assert np.arange(8)[at].tolist() == rows
    assert isinstance(at, slice) == (rows[-1] - rows[0] == len(rows) - 1)
