#!/usr/bin/env python
"""A million random events for the scheduler core: nothing leaks, nobody is lost, nothing stands still.

    soak_core.py [--events 1000000] [--seed 0] [--json]

Events are requests, steps planned and applied, aborts, faults, deadlines, deaths of the engine, for a core of random
sizes, policy, bounds and service level; every 5,000 events it has to finish all, every block must be free again, and
another core takes its place. The fake engine verifies the context of every token.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from treadle.errors import DeadlineUnreachable, Overloaded, PromptTooLong
from treadle.scheduler.config import RESERVE_OUTPUT, CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.fake_engine import FakeEngine
from treadle.scheduler.policies import POLICIES, Policy
from treadle.transport.codec import pack, rank_codec, unpack
from treadle.transport.messages import RowFault, SamplingParams, Submit

VOCAB, ROUND, CHECK_EVERY = 30, 5_000, 40
MakePolicy = Callable[[int], Policy]


def by_name(name: str) -> MakePolicy:
    return lambda seed: POLICIES[name]()


def draw_config(dice: random.Random) -> CoreConfig:
    config = CoreConfig(
        num_blocks=dice.randint(6, 40),
        block_size=dice.choice([1, 2, 4, 8]),
        max_num_seqs=dice.randint(1, 12),
        max_num_batched_tokens=dice.randint(4, 48),
        max_model_len=dice.randint(8, 64),
        vocab_size=VOCAB,
        pipeline_depth=dice.randint(1, 3),
        prefix_cache=dice.random() < 0.8,
        max_prefill_chunk=dice.choice([None, None, 3]),
        max_waiting_requests=dice.choice([8, 40]),
        max_tenant_requests=dice.choice([None, 4]),
        eos_token_ids=dice.choice([(), (0,)]),
        target_tpot=dice.choice([None, 0.005, 0.02]),
        watermark=dice.choice([0.0, 0.01, 0.3]),
        reserve_output=dice.choice(RESERVE_OUTPUT),
        evict_ahead=dice.choice([None, 0, 1, 3]),
    )
    if not config.prefix_cache or dice.random() < 0.3:
        return config
    return replace(
        config,
        swap_blocks=dice.choice([1, 3, 8, 40]),
        preemption=dice.choice(["auto", "auto", "swap", "recompute"]),
        swap_out_seconds=dice.choice([0.0, 1e-4, 1e-3]),
        swap_in_seconds=dice.choice([0.0, 1e-4, 1e-3]),
    )


class Round:
    """One core and what happens to it."""

    def __init__(self, dice: random.Random, make_policy: MakePolicy) -> None:
        self.dice = dice
        self.config = draw_config(dice)
        self.core = Core(self.config, lambda: 7, make_policy(dice.getrandbits(32)))
        self.engine = FakeEngine(self.config)
        self.encoder = rank_codec()
        self.plans: deque[tuple[list[int], int]] = deque()
        self.now = 0.0
        self.serial = 0
        self.seen: Counter[str] = Counter()

    def event(self) -> None:
        kind = self.dice.choices(
            ("add", "plan", "apply", "abort", "wait", "fault", "death"), (12, 40, 40, 3, 4, 0.5, 0.2)
        )[0]
        self.seen[kind] += 1
        if kind == "add":
            self.add()
        elif kind == "plan":
            self.plan()
        elif kind == "apply":
            self.apply(fault=False)
        elif kind == "fault":
            self.apply(fault=True)
        elif kind == "abort":
            self.core.abort(str(self.dice.randint(max(0, self.serial - 30), self.serial)), self.now)
        elif kind == "wait":
            self.now += self.dice.choice([0.001, 0.1, 2.0])
            self.core.expire(self.now)
        else:
            self.engine = FakeEngine(self.config)
            self.plans.clear()
            self.core.reset(self.now)

    def add(self) -> None:
        dice = self.dice
        shared = [dice.randint(0, 2)] * dice.choice([0, 4, 12])
        prompt = shared + [dice.randrange(VOCAB) for _ in range(dice.randint(1, 8))]
        params = SamplingParams(
            n=dice.choice([1, 1, 1, 2]), max_tokens=dice.choice([1, 5, 20, None]), ignore_eos=dice.random() < 0.3
        )
        self.serial += 1
        submit = Submit(
            id=str(self.serial),
            tokens=pack(prompt),
            params=params,
            timeout=dice.choice([0.0, 0.0, 0.0, 0.5, 5.0]),
            priority=dice.choice([0, 0, 0, -1, 2]),
            tenant=dice.choice(["", "a", "b"]),
        )
        try:
            self.core.add(submit, self.now)
        except (Overloaded, PromptTooLong, DeadlineUnreachable) as error:
            self.seen[type(error).__name__] += 1

    def plan(self) -> bool:
        plan = self.core.plan(self.now)
        if plan is None:
            assert self.core.in_flight or not self.core.has_work, "work, nothing in flight, and no plan"
            return False
        self.plans.append((unpack(plan.rows).tolist(), (len(plan.copy_out) + len(plan.copy_in)) // 8))
        self.engine.submit(self.encoder.encode(plan))
        return True

    def apply(self, fault: bool) -> None:
        if not self.plans:
            return
        (rows, copied), result = self.plans.popleft(), self.engine.step()[0]
        if fault:
            result = msgspec.structs.replace(result, faults=[RowFault(self.dice.choice(rows), "it broke")])
        seconds = 0.001 + 0.0002 * len(rows) + 0.0002 * copied
        self.now += seconds
        self.core.apply(result, self.now, seconds)

    def finish(self) -> None:
        """Everything ends, and every block is free or cached."""
        for _ in range(100_000):
            while self.plan():
                pass
            if not self.plans:
                break
            self.apply(fault=False)
        self.core.expire(self.now)
        self.core.check()
        stats = self.core.stats()
        left = (stats.running, stats.waiting, stats.blocks_used, self.core.in_flight)
        assert left == (0, 0, 0, 0) and not self.core.has_work, f"left over: {left}"
        self.seen.update(preemptions=stats.preemptions, tokens=stats.generated_tokens, finished=stats.finished)
        self.seen.update(swapped_out=stats.swapped_out_blocks, swapped_in=stats.swapped_in_blocks)


def soak(events: int, seed: int, policies: Sequence[MakePolicy]) -> Counter[str]:
    """Raises AssertionError with the seed of the round that failed; returns what happened how often."""
    seen: Counter[str] = Counter()
    for number in range(-(-events // ROUND)):
        dice = random.Random(f"{seed}-{number}")
        turn = Round(dice, policies[number % len(policies)])
        try:
            for i in range(min(ROUND, events - number * ROUND)):
                turn.event()
                if i % CHECK_EVERY == 0:
                    turn.core.check()
            turn.finish()
        except Exception as error:
            raise AssertionError(f"seed {seed}, round {number}, {turn.config}: {error!r}") from error
        seen += turn.seen
    return seen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    seen = soak(options.events, options.seed, [by_name(name) for name in POLICIES])
    if options.json:
        print(json.dumps({"events": options.events, "seed": options.seed, **seen}))
    else:
        print(f"{options.events} events, nothing left over: " + ", ".join(f"{n} {k}" for k, n in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
