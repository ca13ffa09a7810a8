"""When the masks of a step are due: exact walks through the core, with the engine that finds out every mistake."""

from __future__ import annotations

import pytest

from treadle.scheduler.fake_engine import FakeEngineError
from treadle.transport.codec import unpack
from treadle.transport.messages import Guided

from .corekit import Rig, config

PATH = Guided(choice=["3 1 4 1 5 9 2 6"])
ALONE = config(eos_token_ids=(0,))


def test_a_free_request_costs_a_plan_nothing() -> None:
    rig = Rig(ALONE)
    rig.add("a", [1, 2])
    assert rig.must_plan().guided == b""
    assert rig.core.masks_due() == []


def test_a_first_sample_is_due_at_once_and_the_next_after_its_token() -> None:
    rig = Rig(ALONE)
    core = rig.core
    rig.add("free", [5], max_tokens=9)
    request = rig.add("a", [1, 2], guided=PATH)
    plans = [core.plan(0.0)]
    first = core.masks_due()
    plans.append(core.plan(0.0))
    assert [unpack(plan.guided).tolist() for plan in plans if plan is not None] == [[request.sequences[0].row]] * 2
    (due,) = first
    assert due.step == 0 and due.sequences == request.sequences and due.output(0, 0) == []
    assert core.masks_due() == [], "step 1 is planned, and nobody knows what step 0 samples"


def test_a_guided_output_is_the_grammars_and_ends() -> None:
    rig = Rig(ALONE)
    rig.add("a", [1, 2], guided=PATH, max_tokens=20)
    rig.add("two", [1, 2], guided=Guided(choice=["7", "8 9"]), n=2)
    rig.drain()
    assert rig.tokens["a", 0] == [3, 1, 4, 1, 5, 9, 2, 6, 0]
    assert rig.finish["a", 0].finish == "stop"
    assert {tuple(rig.tokens["two", index]) for index in (0, 1)} <= {(7, 0), (8, 9, 0)}


def test_a_chunked_prompt_waits_for_masks_only_where_it_samples() -> None:
    rig = Rig(config(eos_token_ids=(0,), max_prefill_chunk=4))
    rig.add("a", [*range(1, 11)], guided=PATH, max_tokens=20)
    plans = [rig.must_plan(), rig.must_plan()]
    assert [plan.guided for plan in plans] == [b"", b""]
    rig.apply()
    assert unpack(rig.must_plan().guided).tolist() == [0]
    rig.drain()


def test_a_preempted_row_gets_its_masks_for_the_token_in_flight() -> None:
    """Blocks run out while its step is on its way: the token will be committed, so it must be the grammar's.

    Three deep, for two deep the masks of a step are made before a plan can preempt who is in it.
    """
    rig = Rig(config(eos_token_ids=(0,), num_blocks=6, block_size=2, max_model_len=10, pipeline_depth=3))
    rig.add("old", [5, 6], max_tokens=8, ignore_eos=True)
    rig.add("young", [7, 8], guided=PATH, max_tokens=8)
    parked = 0
    while rig.core.has_work:
        while rig.plan() is not None:
            pass
        waiting = [s for s in rig.core._running.parked.values() if s.request.id == "young"]
        parked += any(s.in_flight > 1 for s in waiting)
        rig.apply()
    assert parked and rig.core.stats().preemptions
    assert rig.tokens["young", 0] == [3, 1, 4, 1, 5, 9, 2, 6]


def test_after_a_death_a_matcher_goes_on_where_the_tokens_end() -> None:
    rig = Rig(ALONE)
    rig.add("a", [1, 2], guided=PATH, max_tokens=20)
    for _ in range(3):
        rig.step()
    rig.must_plan()
    rig.reset()
    assert rig.core.masks_due() == []
    rig.drain()
    assert rig.tokens["a", 0] == [3, 1, 4, 1, 5, 9, 2, 6, 0]


def test_a_row_that_has_ended_wants_nothing() -> None:
    rig = Rig(ALONE)
    rig.add("a", [1, 2], guided=PATH)
    rig.add("b", [1, 2], guided=PATH)
    rig.must_plan()
    rig.must_plan()
    rig.abort("a")
    rig.core.apply(rig.execute(), 0.0)
    (due,) = rig.core.masks_due()
    assert [sequence is None for sequence in due.sequences] == [True, False]


def test_one_sequence_can_fail_alone() -> None:
    rig = Rig(ALONE)
    request = rig.add("a", [1, 2], guided=PATH, n=2)
    rig.step()
    (output,) = rig.core.fail(request.id, 0, "request_failed", "its grammar broke", 0.0)
    assert (output.finish, output.error_code, output.error) == ("error", "request_failed", "its grammar broke")
    rig.take([output])
    assert rig.core.fail(request.id, 0, "request_failed", "again", 0.0) == []
    rig.drain()
    assert rig.finish["a", 1].finish == "stop"


def test_the_fake_engine_misses_masks() -> None:
    rig = Rig(ALONE)
    rig.add("a", [1, 2], guided=PATH)
    plan = rig.core.plan(0.0)
    assert plan is not None
    with pytest.raises(FakeEngineError, match="masks"):
        rig.engine.run(plan)
