"""Everything that can happen to the core, in any order, with tiny pools; the fake engine verifies each context."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.corekit import Rig, counts
from tests.policykit import ChaosPolicy
from treadle.errors import DeadlineUnreachable, Overloaded, PromptTooLong
from treadle.scheduler.config import RESERVE_OUTPUT, CoreConfig
from treadle.scheduler.policies import POLICIES
from treadle.scheduler.request import Output
from treadle.scheduler.tenant_tally import NOBODY
from treadle.transport.messages import Guided, RowFault, Stats, StepResult

VOCAB = 12
PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]

configs = st.builds(
    CoreConfig,
    num_blocks=st.integers(4, 12),
    block_size=st.sampled_from([1, 2, 3, 4]),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(2, 20),
    max_model_len=st.integers(6, 32),
    vocab_size=st.just(VOCAB),
    pipeline_depth=st.integers(1, 3),
    prefix_cache=st.booleans(),
    max_prefill_chunk=st.sampled_from([None, 1, 2, 5]),
    max_waiting_requests=st.sampled_from([0, 1, 100, 100]),
    eos_token_ids=st.sampled_from([(), (0,)]),
    policy=st.sampled_from(sorted(POLICIES)),
    max_tenant_requests=st.sampled_from([None, None, 2]),
    max_tenant_tokens=st.sampled_from([None, None, 12]),
    target_tpot=st.sampled_from([None, 0.01, 0.1]),
    watermark=st.sampled_from([0.0, 0.01, 0.4]),
    reserve_output=st.sampled_from(RESERVE_OUTPUT),
    evict_ahead=st.sampled_from([None, 0, 1, 3]),
)


@st.composite
def tiered(draw: st.DrawFn) -> CoreConfig:
    """With host memory or without; moving a block costs nothing, or about as much as a token, or as a prompt."""
    config = draw(configs)
    if not config.prefix_cache or not draw(st.sampled_from([True, True, False])):
        return config
    cost = st.sampled_from([0.0, 0.001, 0.004, 0.1])
    return replace(
        config,
        swap_blocks=draw(st.sampled_from([1, 2, 3, 5, 8, 30])),
        preemption=draw(st.sampled_from(["auto", "auto", "swap", "swap", "recompute"])),
        swap_out_seconds=draw(cost),
        swap_in_seconds=draw(cost),
    )


prompts = st.one_of(
    st.integers(1, 14).map(lambda length: PREFIX[:length]),
    st.tuples(st.integers(0, 12), st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)).map(
        lambda parts: PREFIX[: parts[0]] + parts[1]
    ),
)
params = st.fixed_dictionaries(
    {
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "seed": st.sampled_from([None, 0, 2**64 - 1]),
        "max_tokens": st.sampled_from([1, 5, 12, None, None]),
        "min_tokens": st.sampled_from([0, 0, 1, 4]),
        "stop_token_ids": st.sampled_from([[], [], [], [1], [1, 2, 5, 7, 1000]]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([None, None, 2]),
        "prompt_logprobs": st.sampled_from([None, None, None, 1]),
        "guided": st.sampled_from([None, None, Guided(choice=["3", "3 1 4 1 5 9 2 6", "7 7 7 7 7", "3 1 8"])]),
    }
)


class CoreMachine(RuleBasedStateMachine):
    @initialize(config=tiered(), chaos=st.sampled_from([None, None, None, 1, 2, 3]))
    def begin(self, config: CoreConfig, chaos: int | None) -> None:
        self.rig = Rig(config, None if chaos is None else ChaosPolicy(chaos))
        self.serial = 0
        self.logprobs: dict[tuple[str, int], list[int]] = {}

    @rule(
        prompt=prompts,
        chosen=params,
        salt=st.sampled_from(["", "", "a"]),
        timeout=st.sampled_from([0.0, 0.0, 0.0, 1.0, 5.0]),
        priority=st.sampled_from([0, 0, 0, 1]),
        tenant=st.sampled_from(["", "a", "b"]),
    )
    def add(
        self, prompt: list[int], chosen: dict[str, object], salt: str, timeout: float, priority: int, tenant: str
    ) -> None:
        self._add(prompt, chosen, salt, timeout, priority, tenant)

    @rule(several=st.lists(st.tuples(prompts, params), min_size=2, max_size=5))
    def burst(self, several: list[tuple[list[int], dict[str, object]]]) -> None:
        for prompt, chosen in several:
            self._add(prompt, chosen, "", 0.0, 0, "ab"[self.serial % 2])

    def _add(
        self, prompt: list[int], chosen: dict[str, object], salt: str, timeout: float, priority: int, tenant: str
    ) -> None:
        self.serial += 1
        before = self.rig.core.stats()
        own = {figures.name: figures.waiting for figures in self.rig.core.tenants()}.get(tenant or NOBODY, 0)
        more = {"salt": salt, "timeout": timeout, "priority": priority, "tenant": tenant}
        try:
            self.rig.add(str(self.serial), prompt, **more, **chosen)  # type: ignore[arg-type]
        except DeadlineUnreachable:
            assert timeout
        except PromptTooLong:
            assert len(prompt) >= self.rig.config.capacity
        except Overloaded as error:
            assert error.retry_after > 0
            config = self.rig.config
            left = before.blocks_total - before.blocks_used
            scarce = left <= max(before.running, config.watermark * config.num_blocks)
            full = before.running == config.max_num_seqs or scarce
            assert before.waiting or (full and not config.max_waiting_requests)
            assert own or error.bound == "queue"
        else:
            assert len(prompt) < self.rig.config.capacity
            self._check_tenant(own, before, chosen["n"])

    def _check_tenant(self, own: int, before: Stats, count: object) -> None:
        """Of a tenant that already waited, at most so many are there now for whom no row may be left."""
        assert isinstance(count, int)
        config = self.rig.config
        if own and config.max_tenant_requests is not None:
            left = config.max_num_seqs - before.running - (before.waiting - own)
            assert own + count - max(0, left) <= config.max_tenant_requests

    @rule()
    def plan(self) -> None:
        full = self.rig.core.in_flight >= self.rig.config.pipeline_depth
        plan = self.rig.plan()
        if full:
            assert plan is None
        elif not self.rig.core.in_flight:
            assert not self.rig.core.has_work, "work, nothing in flight, and still no plan"

    @precondition(lambda self: self.rig.core.in_flight)
    @rule()
    def apply(self) -> None:
        self._apply(self.rig.execute())

    @rule(steps=st.integers(1, 30))
    def run(self, steps: int) -> None:
        """Most of the time the thing simply runs, with a full pipeline."""
        for _ in range(steps):
            while self.rig.plan() is not None:
                pass
            if self.rig.core.in_flight:
                self._apply(self.rig.execute())

    @precondition(lambda self: self.rig.core.in_flight)
    @rule(pick=st.integers(0, 7))
    def fault(self, pick: int) -> None:
        rows = list(counts(self.rig.plans[0]))
        fault = RowFault(rows[pick % len(rows)], "it broke")
        self._apply(msgspec.structs.replace(self.rig.execute(), faults=[fault]))

    @rule(pick=st.integers(0, 30), index=st.sampled_from([-1, -1, 0, 1, 5]))
    def abort(self, pick: int, index: int) -> None:
        name = str(pick % (self.serial + 1))
        alive = {key for key in self.rig.expected if key[0] == name and key not in self.rig.finish}
        ended = {(output.sequence.request.id, output.sequence.index) for output in self.rig.abort(name, index)}
        if not self._unsaid():
            assert ended == {key for key in alive if index in (-1, key[1])}

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait(self, seconds: float) -> None:
        self.rig.now += seconds
        self.rig.expire()
        deadline = self.rig.core.next_deadline()
        assert deadline is None or deadline > self.rig.now

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def wait_unnoticed(self, seconds: float) -> None:
        self.rig.now += seconds

    @precondition(lambda self: self.rig.core.in_flight)
    @rule(really=st.booleans())
    def engine_dies(self, really: bool) -> None:
        if really:
            self.rig.reset()

    @invariant()
    def check(self) -> None:
        if hasattr(self, "rig"):
            self.rig.core.check()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.drain()

    def _unsaid(self) -> bool:
        return self.rig.core.next_deadline() == 0.0

    def _apply(self, result: StepResult) -> None:
        """Steps take so long that prompts are held back under some targets, and deadlines become unreachable."""
        plan = self.rig.plans[0]
        copied = (len(plan.copy_out) + len(plan.copy_in)) // 8
        seconds = 0.001 * (1 + sum(counts(plan).values()) + 2 * copied)
        for output in self.rig.apply(result, seconds).others:
            self._check_logprobs(output)

    def _check_logprobs(self, output: Output) -> None:
        sequence = output.sequence
        assert [item.token_id for item in output.logprobs] in ([], output.tokens)
        delivered = self.logprobs.setdefault((sequence.request.id, sequence.index), [])
        delivered += [item.position for item in output.prompt_logprobs]
        assert delivered == list(range(1, len(delivered) + 1)), "prompt positions repeated, lost or out of order"


CoreMachine.TestCase.settings = settings(
    max_examples=160,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestCoreMachine = CoreMachine.TestCase
