"""A scheduler core and real engine ranks in one process: ranks are threads, plans and results cross as bytes.

Everything but ZeroMQ and the processes is the product's own code, so hundreds of combinations run in seconds.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import msgspec

from treadle.engine.config import load_config
from treadle.engine.cuda.runner import CudaRunner, Ticket
from treadle.engine.loading import Emulate, Loaded, load
from treadle.engine.runner import Runner
from treadle.engine.worker import run_step
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import CostModel
from treadle.transport.codec import Digest, engine_codec, pack, rank_codec
from treadle.transport.messages import Configure, Delta, Masks, SamplingParams, Stats, StepPlan, StepResult, Submit

from .guidekit import Guiding, llg

Requests: TypeAlias = list[tuple[str, list[int], SamplingParams]]


def configure_for(model: Path, shared_dir: Path, world_size: int = 1, **changes: object) -> Configure:
    """What ranks of a small model are told; changes: fields of `Configure`."""
    configure = Configure(
        model=str(model),
        random_weights=False,
        seed=0,
        world_size=world_size,
        device="cpu",
        dtype="float32",
        kv_dtype="",
        block_size=8,
        num_blocks=512,
        kv_cache_bytes=0,
        max_num_seqs=16,
        max_num_batched_tokens=256,
        max_model_len=256,
        init_method=f"file://{shared_dir / 'rendezvous'}",
        threads=1,
        native=True,
        shared_dir=str(shared_dir),
        debug=True,
    )
    return msgspec.structs.replace(configure, **changes)


def core_for(configure: Configure, costs: CostModel | None = None, **changes: object) -> Core:
    """A core that fits ranks with this configuration. costs: that it is to know; here no step takes any time."""
    values: dict[str, object] = {
        "num_blocks": configure.num_blocks,
        "block_size": configure.block_size,
        "max_num_seqs": configure.max_num_seqs,
        "max_num_batched_tokens": configure.max_num_batched_tokens,
        "max_model_len": configure.max_model_len,
        "vocab_size": load_config(Path(configure.model)).vocab_size,
        "swap_blocks": configure.swap_blocks,
        "reserve_output": "none",  # where blocks are few, preemption is to happen
        **changes,
    }
    return Core(CoreConfig(**values), draw_seed=lambda: 1, costs=costs)  # type: ignore[arg-type]


def _share_a_core() -> None:
    """One thread at a time holds the interpreter's lock: on several cores the others would only wait more busily."""
    cores = sorted(os.sched_getaffinity(0))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[worker % len(cores)]})


class LocalGroup:
    """Ranks as threads. Close it, or use it in a `with`.

    emulate: run them as on a GPU, see `load`.
    """

    def __init__(
        self,
        model: Path,
        shared_dir: Path,
        world_size: int = 1,
        emulate: Emulate = "",
        **changes: object,
    ) -> None:
        self.configure = configure_for(model, shared_dir, world_size, **changes)
        self._pool = ThreadPoolExecutor(world_size, initializer=_share_a_core)
        ranks = range(world_size)
        self._ranks: list[Loaded] = list(
            self._pool.map(lambda rank: load(self.configure, rank, emulate=emulate), ranks)
        )
        self._digests = [Digest() for _ in ranks]
        self._codec = rank_codec()

    @property
    def runners(self) -> list[Runner | CudaRunner]:
        return [rank.runner for rank in self._ranks]

    def step(self, frame: bytes, masks: bytes = b"") -> StepResult:
        """What rank 0 answers, after all ranks were seen to agree. masks: bytes of the plan's, if it waits for any."""

        def take() -> tuple[Masks, bytes]:
            return self._codec.decode(masks), masks

        def one(rank: int) -> StepResult:
            plan = self._codec.decode(frame)
            return run_step(self._ranks[rank].runner, plan, frame, self._digests[rank], rank, take)

        results = list(self._pool.map(one, range(len(self._ranks))))
        assert len({result.digest for result in results}) == 1, "the ranks disagree"
        return results[0]

    def forget(self) -> None:
        """Makes the ranks ready for another core."""
        for rank in self._ranks:
            rank.runner.forget()

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


class Driver:
    """Runs requests through a core and a group to their end, and keeps what each continuation got.

    check: the core's invariants after every step, or only at the end. costs: that the core begins with. changes: of the
    core's configuration.
    """

    def __init__(
        self, group: LocalGroup, check: bool = True, costs: CostModel | None = None, **changes: object
    ) -> None:
        self.core = core_for(group.configure, costs, **changes)
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.finish: dict[tuple[str, int], str] = {}
        self.deltas: list[Delta] = []
        self._group = group
        self._check = check
        group.forget()
        self._codec = engine_codec()
        self._in_flight: deque[tuple[int, bytes]] = deque()
        self._masks: dict[int, bytes] = {}
        self._guiding: Guiding | None = None
        self.steps = 0

    def submit(self, request_id: str, prompt: Sequence[int], params: SamplingParams) -> None:
        request = self.core.add(Submit(id=request_id, tokens=pack(prompt), params=params), 0.0)
        if params.guided is not None:
            self._guiding = self._guiding or Guiding(llg(Path(self._group.configure.model)))
            self._guiding.begin(request)

    def run(self, each_step: Callable[[int], None] = lambda step: None) -> None:
        while self.core.has_work:
            while (plan := self.core.plan(0.0)) is not None:
                self._in_flight.append((plan.step, self._codec.encode(plan)))
            if self._check:
                self.core.check()
            assert self._in_flight, "work, and nothing to do: a deadlock"
            outputs = self.core.apply(self._step(), 0.0)
            for output in outputs.each():
                key = (output.sequence.request.id, output.sequence.index)
                self.tokens.setdefault(key, []).extend(output.tokens)
                if output.finish:
                    self.finish[key] = output.finish
            self.steps += 1
            each_step(self.steps)
        while self._in_flight:
            self.core.apply(self._step(), 0.0)
        self.core.check()

    def _step(self) -> StepResult:
        for made in self._guiding.made(self.core) if self._guiding is not None else ():
            self._masks[made.masks.step] = self._codec.encode(made.masks)
        step, frame = self._in_flight.popleft()
        return self._group.step(frame, self._masks.pop(step, b""))


class Overlapped:
    """One rank on this thread with up to `depth` steps launched before the first is read, as `worker` does it.

    most: steps that were open at once.
    """

    def __init__(self, configure: Configure, emulate: Emulate = "") -> None:
        self.configure = configure
        loaded = load(configure, 0, emulate=emulate)
        assert isinstance(loaded.runner, CudaRunner)
        self.runner = loaded.runner
        self.ready = loaded.ready
        self.most = 0
        self.stats = Stats()

    def run(
        self, requests: Requests, depth: int, costs: CostModel | None = None, **changes: object
    ) -> dict[str, list[int]]:
        """Tokens by request. costs, changes: of the core's configuration. `stats`: of the core, afterwards."""
        core = core_for(self.configure, costs, pipeline_depth=depth, **changes)
        guided = any(params.guided is not None for _, _, params in requests)
        guiding = Guiding(llg(Path(self.configure.model))) if guided else None
        for name, prompt, params in requests:
            request = core.add(Submit(id=name, tokens=pack(prompt), params=params), 0.0)
            if guiding is not None:
                guiding.begin(request)
        tokens: dict[str, list[int]] = {}
        steps: deque[tuple[int, Ticket]] = deque()
        plans: deque[StepPlan] = deque()
        while core.has_work or steps:
            while (plan := core.plan(0.0)) is not None:
                plans.append(plan)
            masks = {made.masks.step: made.masks for made in (guiding.made(core) if guiding is not None else ())}
            self._launch(plans, steps, masks)
            self.most = max(self.most, len(steps))
            step, ticket = steps.popleft()
            outcome = self.runner.collect(ticket)
            assert self.runner.done(ticket)
            result = StepResult(step, 0, 0, pack(outcome.tokens), 0, outcome.logprobs, outcome.faults)
            for output in core.apply(result, 0.0).each():
                tokens.setdefault(output.sequence.request.id, []).extend(output.tokens)
        self.runner.forget()
        self.stats = core.stats()
        return tokens

    def _launch(self, plans: deque[StepPlan], steps: deque[tuple[int, Ticket]], masks: dict[int, Masks]) -> None:
        """Launches all that can be, as `worker` does: what is behind a step without masks waits with it."""
        while True:
            if steps and steps[-1][1].unsampled is not None:
                if steps[-1][0] not in masks:
                    return
                self.runner.sample(steps[-1][1], masks[steps[-1][0]])
            elif plans:
                plan = plans.popleft()
                steps.append((plan.step, self.runner.submit(plan)))
            else:
                return
