"""A core and a fake engine in one hand, for tests."""

from __future__ import annotations

from dataclasses import replace

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import CostModel, chunk_pairs
from treadle.scheduler.fake_engine import Expected, FakeEngine, expected_output
from treadle.scheduler.policies import Policy
from treadle.scheduler.request import Output, Outputs, Request
from treadle.transport.codec import pack, rank_codec, unpack
from treadle.transport.messages import SamplingParams, StepPlan, StepResult, Submit

from .guidekit import Guiding, TrieGrammar, TrieMatching

DRAWN_SEED = 7
CONFIG = CoreConfig(
    num_blocks=65,
    block_size=4,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=64,
    vocab_size=100,
    reserve_output="none",  # admission that looks ahead has tests of its own; here blocks are to run out
)


def config(**changes: object) -> CoreConfig:
    return replace(CONFIG, **changes)  # type: ignore[arg-type]


def counts(plan: StepPlan) -> dict[int, int]:
    """Tokens that the plan computes, by row, in plan order."""
    return dict(zip(unpack(plan.rows).tolist(), unpack(plan.counts).tolist(), strict=True))


class Rig:
    """Checks the core after every event and remembers, by (request id, index), what came out and how it ended."""

    def __init__(
        self, config: CoreConfig = CONFIG, policy: Policy | None = None, costs: CostModel | None = None
    ) -> None:
        self.config = config
        self.core = Core(config, lambda: DRAWN_SEED, policy, costs)
        self.engine = FakeEngine(config)
        self.guiding = Guiding(TrieMatching(config.vocab_size, config.eos_token_ids))
        self.now = 0.0
        self.plans: list[StepPlan] = []
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], Output] = {}
        self.expected: dict[tuple[str, int], Expected] = {}
        self._codec = rank_codec()

    def add(
        self,
        name: str,
        prompt: list[int],
        *,
        timeout: float = 0.0,
        priority: int = 0,
        salt: str = "",
        tenant: str = "",
        **params: object,
    ) -> Request:
        chosen = SamplingParams(**params)  # type: ignore[arg-type]
        submit = Submit(
            id=name,
            tokens=pack(prompt),
            params=chosen,
            timeout=timeout,
            priority=priority,
            cache_salt=salt,
            tenant=tenant,
        )
        request = self.core.add(submit, self.now)
        self.core.check()
        grammar = self.guiding.begin(request)
        allows = grammar.allows if isinstance(grammar, TrieGrammar) else None
        for index in range(chosen.n):
            assert (name, index) not in self.expected
            self.expected[name, index] = expected_output(
                prompt, chosen, self.config, seed=DRAWN_SEED, index=index, allows=allows
            )
            self.tokens[name, index] = []
        return request

    def plan(self) -> StepPlan | None:
        plan = self.core.plan(self.now)
        self.core.check()
        if plan is not None:
            assert sum(counts(plan).values()) <= self.config.max_num_batched_tokens
            self._check_shape(plan)
            self.plans.append(plan)
            self.engine.submit(self._codec.encode(plan))
            self._guide()
        return plan

    def _check_shape(self, plan: StepPlan) -> None:
        """What the plan says it costs is what it computes: decodes first, chunks after."""
        shape, computed = self.core.last_shape, self.core._running.rows.computed
        ends = [(count, int(computed[row])) for row, count in counts(plan).items()]
        chunks = ends[shape.decode_rows :]
        assert all(count == 1 for count, _ in ends[: shape.decode_rows])
        assert shape.context_tokens == sum(end for _, end in ends[: shape.decode_rows])
        assert shape.prefill_tokens == sum(count for count, _ in chunks)
        assert shape.chunk_pairs == sum(chunk_pairs(count, end) for count, end in chunks)
        assert (shape.blocks_out, shape.blocks_in) == (len(plan.copy_out) // 8, len(plan.copy_in) // 8)

    def _guide(self) -> None:
        for made in self.guiding.made(self.core):
            self.engine.submit_masks(self._codec.encode(made.masks))

    def must_plan(self) -> StepPlan:
        plan = self.plan()
        assert plan is not None
        return plan

    def execute(self) -> StepResult:
        return self.engine.step()[0]

    def apply(self, result: StepResult | None = None, seconds: float = 0.0) -> Outputs:
        outputs = self.core.apply(self.execute() if result is None else result, self.now, seconds)
        self.core.check()
        self.plans.pop(0)
        seen = [(output.sequence.request.id, output.sequence.index) for output in outputs.each()]
        assert len(seen) == len(set(seen)), "a sequence appears twice in one step"
        self.take(list(outputs.each()))
        self._guide()
        return outputs

    def step(self) -> Outputs:
        self.must_plan()
        return self.apply()

    def abort(self, name: str, index: int = -1) -> list[Output]:
        return self.take(self.core.abort(name, self.now, index))

    def expire(self) -> list[Output]:
        return self.take(self.core.expire(self.now))

    def reset(self) -> list[Output]:
        """The engine dies with everything in it, and another takes its place."""
        self.engine = FakeEngine(self.config)
        self.plans.clear()
        return self.take(self.core.reset(self.now))

    def take(self, outputs: list[Output]) -> list[Output]:
        self.core.check()
        self.guiding.end(outputs)
        for output in outputs:
            key = (output.sequence.request.id, output.sequence.index)
            assert key not in self.finish, f"{key} goes on after its end"
            self.tokens[key] += output.tokens
            expected = self.expected[key]
            assert self.tokens[key] == expected.tokens[: len(self.tokens[key])], f"{key} has a wrong token"
            if output.finish:
                self.finish[key] = output
            if output.finish in ("stop", "length"):
                assert self.tokens[key] == expected.tokens, f"{key} ended early"
                assert (output.finish, output.stop_token) == (expected.finish, expected.stop_token)
        return outputs

    def drain(self, max_steps: int = 20_000) -> None:
        """Runs until everything has ended, as full a pipeline as allowed; then nothing may be left."""
        for _ in range(max_steps):
            while self.plan() is not None:
                pass
            if not self.core.in_flight:
                break
            self.apply()
        self.expire()
        assert not self.core.has_work, "the core stopped with work left, or never stopped"
        assert set(self.finish) == set(self.expected), "a sequence never ended"
        stats = self.core.stats()
        assert not len(self.guiding.rows), "a matcher outlived its sequence"
        assert (stats.blocks_used, stats.running, stats.waiting, self.core.in_flight) == (0, 0, 0, 0)
