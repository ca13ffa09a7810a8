"""What `bench_scheduler.py` measures: each case sets the core up and then is run as often as one likes.

`run` returns nanoseconds, by part where a case has parts. No sockets, no model, the real codec.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections import deque
from time import perf_counter_ns

import msgspec
import numpy as np

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.delivery import Route, Sink
from treadle.transport.codec import engine_codec, pack, rank_codec, service_codec
from treadle.transport.messages import SamplingParams, StepPlan, StepResult, Submit

VOCAB = 50_000
BLOCK = 16
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None)


def make_core(rows: int, max_len: int, budget: int, spare_blocks: int = 0) -> Core:
    """Rows of `max_len` tokens fit all at once. There is no bound on the queue."""
    config = CoreConfig(
        num_blocks=rows * -(-max_len // BLOCK) + spare_blocks + 1,
        block_size=BLOCK,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_model_len=max_len,
        vocab_size=VOCAB,
        eos_token_ids=(0,),
        max_waiting_requests=1 << 20,
        max_waiting_tokens=1 << 40,
    )
    return Core(config, draw_seed=lambda: 1)


def next_plan(core: Core) -> StepPlan:
    plan = core.plan(0.0)
    if plan is None:
        raise RuntimeError("nothing to do")
    return plan


def answer(plan: StepPlan, sampling: int) -> StepResult:
    """The same token for everybody, never EOS."""
    return StepResult(plan.step, 0, 0, pack(np.full(sampling, plan.step % (VOCAB - 1) + 1, np.int32)), 0)


class Decode:
    """A steady step of `rows` greedy rows: plan, encode; decode rank 0's result, apply it.

    At pipeline depth 2, as it runs: plan N + 1, then apply N. Behind `context` tokens, up to a block more, so that in
    each step a sixteenth of the rows takes a new block and publishes a full one. queued: requests that wait meanwhile.
    """

    def __init__(self, rows: int, context: int, steps: int, queued: int = 0) -> None:
        max_len = context + 2 * BLOCK + steps
        self.rows = rows
        self.core = make_core(rows, max_len, budget=rows * max_len, spare_blocks=rows)
        self._plans, self._results = rank_codec(), engine_codec()
        random = np.random.default_rng(0)
        for index in range(rows):
            prompt = random.integers(1, VOCAB, context + index % BLOCK)
            self.core.add(Submit(id=str(index), tokens=pack(prompt), params=ENDLESS), 0.0)
        self._frames = deque([self._answer(next_plan(self.core))])  # one great step of prefills
        for index in range(queued):
            self.core.add(Submit(id=f"queued-{index}", tokens=pack([1, 2, 3]), params=ENDLESS), 0.0)
        gc.collect()

    def run(self, count: int) -> dict[str, list[int]]:
        parts: dict[str, list[int]] = {"total": [], "plan": [], "encode": [], "decode": [], "apply": []}
        for _ in range(count):
            times = self._step()
            for name, part in zip(parts, (sum(times), *times), strict=True):
                parts[name].append(part)
        return parts

    def _step(self) -> tuple[int, int, int, int]:
        began = perf_counter_ns()
        plan = next_plan(self.core)
        planned = perf_counter_ns()
        self._plans.encode(plan)
        encoded = perf_counter_ns()
        self._frames.append(self._answer(plan))
        frame = self._frames.popleft()
        received = perf_counter_ns()
        result = self._results.decode(frame)
        decoded = perf_counter_ns()
        if not isinstance(result, StepResult) or len(self.core.apply(result, 0.0).tokens) != self.rows:
            raise RuntimeError("not every row got a token")
        return planned - began, encoded - planned, decoded - received, perf_counter_ns() - decoded

    def _answer(self, plan: StepPlan) -> bytes:
        return self._results.encode(answer(plan, self.rows))


class Admission:
    """`add`, plan and encode of a request with a prompt of `length` tokens, none of it cached, or all that can be.

    The pool is full of what was cached before, so a cold prompt evicts as many blocks as it takes.
    """

    def __init__(self, length: int, cached: bool) -> None:
        self._core = make_core(64, length + 64, budget=2 * length)
        self._codec = rank_codec()
        self._random = np.random.default_rng(1)
        self._length = length
        self._fixed = pack(self._random.integers(1, VOCAB, length)) if cached else b""
        self._made = 0
        self.run(1 if cached else 80)

    def run(self, count: int) -> list[int]:
        return [self._once() for _ in range(count)]

    def _once(self) -> int:
        prompt = self._fixed or pack(self._random.integers(1, VOCAB, self._length))
        self._made += 1
        name = str(self._made)
        began = perf_counter_ns()
        self._core.add(Submit(id=name, tokens=prompt, params=ENDLESS), 0.0)
        plan = next_plan(self._core)
        self._codec.encode(plan)
        took = perf_counter_ns() - began
        self._core.apply(answer(plan, 1), 0.0)
        self._core.abort(name, 0.0)
        return took


class End:
    """The end of a running request of `length` tokens: an abort, or the step whose token is its last one (`apply`).

    beside: how many other requests run, and ten times as many wait.
    """

    def __init__(self, length: int, finish: bool, beside: int = 0) -> None:
        self._core = make_core(beside + 1, length + 64, budget=length + beside + 64)
        for index in range(beside):
            self._core.add(Submit(id=f"beside-{index}", tokens=pack([1]), params=ENDLESS), 0.0)
        if beside:
            self._core.apply(answer(next_plan(self._core), beside), 0.0)
        for index in range(10 * beside):
            self._core.add(Submit(id=f"waits-{index}", tokens=pack([1]), params=ENDLESS, priority=1), 0.0)
        self._random = np.random.default_rng(2)
        self._length = length
        self._finish = finish
        self._beside = beside
        self._made = 0

    def run(self, count: int) -> list[int]:
        return [self._once() for _ in range(count)]

    def _once(self) -> int:
        self._made += 1
        params = SamplingParams(temperature=0.0, max_tokens=1 if self._finish else None)
        prompt = pack(self._random.integers(1, VOCAB, self._length))
        self._core.add(Submit(id=str(self._made), tokens=prompt, params=params), 0.0)
        result = answer(next_plan(self._core), 1 + self._beside)
        began = perf_counter_ns()
        if self._finish:
            outputs = self._core.apply(result, 0.0)
            took = perf_counter_ns() - began
            if len(outputs.finished) != 1:
                raise RuntimeError("it did not finish")
            return took
        self._core.abort(str(self._made), 0.0)
        took = perf_counter_ns() - began
        self._core.apply(result, 0.0)
        return took


class _Nowhere(Sink):
    def flush(self) -> None:
        """Nobody reads."""


def queued_bytes(count: int, length: int) -> float:
    """Bytes of Python objects (tracemalloc) for each waiting request, those of its tokens not counted.

    Taken in as the service does it: a decoded message, its route, and its entry in the list of its client.
    """
    core, sink, codec = make_core(1, 2 * length, 2 * length), _Nowhere("client-1"), service_codec()
    prompt = pack(np.ones(length, np.int32))
    frames = [codec.encode(Submit(id=f"{index:032x}", tokens=prompt, params=ENDLESS)) for index in range(count)]
    gc.collect()
    tracemalloc.start()
    for frame in frames:
        submit = codec.decode(frame)
        if not isinstance(submit, Submit):
            raise RuntimeError("not what was sent")
        request = core.add(msgspec.structs.replace(submit, id=f"{sink.name}/{submit.id}"), 0.0)
        request.context = Route(sink, submit.id)
        sink.open[submit.id] = submit.params.n
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return used / count - len(prompt)
