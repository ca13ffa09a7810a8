"""The fake engine is only worth something if it finds each kind of wrong plan."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from tests.corekit import CONFIG, Rig, config
from treadle.scheduler.fake_engine import FakeEngine, FakeEngineError, expected_output
from treadle.transport.codec import Digest, pack, rank_codec, unpack
from treadle.transport.messages import RowStart, SamplingParams, StepPlan

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


def start(row: int, tokens: list[int], blocks: list[int], computed: int = 0) -> RowStart:
    return RowStart(row, len(tokens), computed, pack(tokens), pack(blocks), GREEDY, 1, b"")


def plan(step: int, starts: list[RowStart], work: dict[int, int], grow: dict[int, int] | None = None) -> StepPlan:
    grow = grow or {}
    return StepPlan(
        step, b"", starts, pack(list(grow)), pack(list(grow.values())), pack(list(work)), pack(list(work.values()))
    )


def test_it_is_a_pure_function_of_seed_and_tokens() -> None:
    together, alone = FakeEngine(CONFIG), FakeEngine(CONFIG)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [1, 2, 3]]
    starts = [start(row, prompt, [row + 1]) for row, prompt in enumerate(prompts)]
    tokens = unpack(together.run(plan(0, starts, {0: 3, 1: 4, 2: 3})).tokens).tolist()
    assert tokens[0] == tokens[2] != tokens[1]
    alone.run(plan(0, [start(0, prompts[0], [9])], {0: 1}))
    assert unpack(alone.run(plan(1, [], {0: 2})).tokens).tolist() == tokens[:1]
    assert expected_output(prompts[0], GREEDY, CONFIG, seed=1).tokens[0] == tokens[0]
    assert expected_output(prompts[0], GREEDY, CONFIG, seed=2).tokens[0] != tokens[0]


def test_eos_comes_now_and_then() -> None:
    ends = [expected_output([i], GREEDY, config(eos_token_ids=(0,), vocab_size=1000)).finish for i in range(40)]
    assert ends.count("stop") > 5


def test_ranks_agree_and_the_digest_covers_plans_and_tokens() -> None:
    engine = FakeEngine(CONFIG, world_size=3, cost=lambda tokens, rows: 10 * tokens + rows)
    frame = rank_codec().encode(plan(0, [start(0, [1, 2], [1])], {0: 2}))
    engine.submit(frame)
    assert engine.queued == 1
    results = engine.step()
    digest = Digest()
    digest.add(frame)
    digest.add(results[0].tokens)
    assert [(r.rank, r.digest, r.elapsed_us) for r in results] == [(rank, digest.value, 21) for rank in range(3)]
    assert results[1].tokens == b"" != results[0].tokens


GOOD = plan(0, [start(0, [1, 2, 3, 4, 5], [1, 2])], {0: 5})
Wrong = Callable[[], list[StepPlan]]
WRONG: dict[str, tuple[Wrong, str]] = {
    "out of order": (lambda: [GOOD, plan(2, [], {0: 1})], "out of order"),
    "started twice": (lambda: [GOOD, plan(1, [start(0, [1], [3])], {0: 1})], "started twice"),
    "row not started": (lambda: [plan(0, [], {3: 1})], "never started"),
    "no such row": (lambda: [plan(0, [start(8, [1], [3])], {8: 1})], "does not exist"),
    "released, not started": (lambda: [msgspec.structs.replace(GOOD, release=pack([4]))], "not started"),
    "null block": (lambda: [plan(0, [start(0, [1], [0])], {0: 1})], "bad or repeated"),
    "block past the end": (lambda: [plan(0, [start(0, [1], [65])], {0: 1})], "bad or repeated"),
    "repeated block": (lambda: [GOOD, plan(1, [], {0: 1}, grow={0: 1})], "bad or repeated"),
    "a block too few": (lambda: [plan(0, [start(0, [1, 2, 3, 4, 5], [1])], {0: 5})], "5 tokens in 1 blocks"),
    "too many tokens": (lambda: [plan(0, [start(0, [1, 2], [1])], {0: 3})], "2 are known"),
    "nothing to compute": (lambda: [plan(0, [start(0, [1, 2], [1])], {0: 0})], "0 tokens to compute"),
    "over budget": (lambda: [plan(0, [start(0, [1] * 65, list(range(1, 18)))], {0: 65})], "budget"),
    "prefix never computed": (lambda: [plan(0, [start(0, [1, 2, 3, 4, 5], [1, 2], computed=4)], {0: 1})], "position 0"),
    "another's prefix": (
        lambda: [GOOD, plan(1, [start(1, [1, 2, 3, 9, 5], [1, 3], computed=4)], {1: 1})],
        "position 3 holds another",
    ),
    "same tokens behind another prefix": (
        lambda: [
            plan(0, [start(0, [9, 9, 9, 9, 1, 2, 3, 4], [1, 2])], {0: 8}),
            plan(1, [start(1, [1, 2, 3, 4, 5], [2, 3], computed=4)], {1: 1}),
        ],
        "position 0 holds another",
    ),
    "block in use by two": (
        lambda: [GOOD, plan(1, [start(1, [7, 7], [2])], {1: 2}), plan(2, [], {0: 1})],
        "row 0: position 4 holds another",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_found(name: str) -> None:
    make, says = WRONG[name]
    *before, wrong = make()
    engine = FakeEngine(CONFIG)
    for good in before:
        engine.run(good)
    with pytest.raises(FakeEngineError, match=says):
        engine.run(wrong)


def test_a_right_prefix_hit_is_accepted_even_in_the_same_step() -> None:
    engine = FakeEngine(CONFIG)
    both = [start(0, [1, 2, 3, 4, 5], [1, 2]), start(1, [1, 2, 3, 4, 6], [1, 3], computed=4)]
    assert len(unpack(engine.run(plan(0, both, {0: 5, 1: 1})).tokens)) == 2
    assert engine.live_rows == 2


def test_banned_until_min_tokens() -> None:
    rig = Rig(config(vocab_size=2, eos_token_ids=(1,)))
    rig.add("a", [0], min_tokens=10, max_tokens=30)
    rig.drain()
    assert rig.tokens["a", 0][:10] == [0] * 10
