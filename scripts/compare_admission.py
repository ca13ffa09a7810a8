#!/usr/bin/env python
"""What admission keeps for outputs to come, compared: nothing, everything, or what the tenants' outputs let expect.

    compare_admission.py [--json] [--requests 200] [--blocks 301] [--prompt 33] [--seed 0]

The scheduler core and the fake engine in virtual time, so the same seed gives the same numbers on every machine. All
requests wait from the start; output lengths are log-normal (tenant "chat") or Pareto with a heavy tail (tenant
"report"), and `max_tokens` is 1,024 for everybody. No request tells its length: the engine ends it with EOS. Prompts
are log-normal around --prompt tokens.

rows: mean number of rows that run in a step. recomputed: tokens whose K/V was there before a preemption, as a share of
all tokens computed. seconds: of virtual time until all have ended, by the costs of an 8B model on one GPU. pause: the
longest gap between two tokens of a request, mean over the requests and 99th percentile, seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from dataclasses import asdict, dataclass

import numpy as np

from treadle.scheduler.config import RESERVE_OUTPUT, CoreConfig
from treadle.scheduler.core import Core
from treadle.scheduler.cost_model import CostModel, StepCosts
from treadle.scheduler.fake_engine import FakeEngine
from treadle.transport.codec import pack, rank_codec, unpack
from treadle.transport.messages import SamplingParams, Submit

EOS, VOCAB, MAX_TOKENS, MAX_PROMPT = 0, 1_000, 1_024, 2_048
GPU = StepCosts(step=6e-3, prefill_token=32e-6, decode_row=4e-6, context_token=40e-9, chunk_pair=1e-9)


@dataclass(frozen=True, slots=True)
class Outcome:
    preemptions: int
    recomputed_tokens: int
    recomputed: float
    rows: float
    steps: int
    seconds: float
    tokens_per_second: float
    pause_mean: float
    pause_p99: float


class LengthEngine(FakeEngine):
    """Ends each output at the length that stands in its request's seed; verifies every context all the same."""

    def _sample(self, row, masked) -> int:  # type: ignore[no-untyped-def]
        there = len(row.tokens) - row.prompt_len + 1
        token = EOS if there >= row.params.seed else 1 + (there * 7 + row.params.seed) % (VOCAB - 1)
        row.tokens.append(token)
        row.extend_hashes()
        return token


def workload(requests: int, prompt_tokens: float, seed: int) -> list[Submit]:
    random = np.random.default_rng(seed)
    submits = []
    for i in range(requests):
        tenant = "report" if random.random() < 0.3 else "chat"
        drawn = 200 * (1 + random.pareto(1.3)) if tenant == "report" else random.lognormal(4.5, 0.9)
        length = int(np.clip(drawn, 1, MAX_TOKENS))
        prompt = random.integers(1, VOCAB, int(np.clip(random.lognormal(np.log(prompt_tokens), 0.8), 1, MAX_PROMPT)))
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, seed=length)
        submits.append(Submit(id=str(i), tokens=pack(prompt), params=params, tenant=tenant))
    return submits


def run(reserve_output: str, submits: list[Submit], blocks: int) -> Outcome:
    """All of them through the core, two steps in flight, until nothing is left."""
    config = CoreConfig(
        num_blocks=blocks,
        block_size=16,
        max_num_seqs=128,
        max_num_batched_tokens=1024,
        max_model_len=MAX_PROMPT + MAX_TOKENS,
        vocab_size=VOCAB,
        eos_token_ids=(EOS,),
        max_waiting_requests=1 << 20,
        max_waiting_tokens=1 << 40,
        reserve_output=reserve_output,
    )
    core, engine, costs, encoder = Core(config, lambda: 0), LengthEngine(config), CostModel(GPU), rank_codec()
    for submit in submits:
        core.add(submit, 0.0)
    now, computed, rows, steps = 0.0, 0, 0, 0
    flights: deque[float] = deque()
    last: dict[str, float] = {}
    pauses: dict[str, float] = {submit.id: 0.0 for submit in submits}
    while core.has_work:
        while (plan := core.plan(now)) is not None:
            engine.submit(encoder.encode(plan))
            counts = unpack(plan.counts)
            flights.append(costs.predict(core.last_shape))
            computed, rows, steps = computed + int(counts.sum()), rows + counts.size, steps + 1
        seconds = flights.popleft()
        now += seconds
        for output in core.apply(engine.step()[0], now, seconds).each():
            name = output.sequence.request.id
            pauses[name] = max(pauses[name], now - last.get(name, now))
            last[name] = now
    stats = core.stats()
    return Outcome(
        preemptions=stats.preemptions,
        recomputed_tokens=stats.recomputed_tokens,
        recomputed=round(stats.recomputed_tokens / computed, 4),
        rows=round(rows / steps, 1),
        steps=steps,
        seconds=round(now, 2),
        tokens_per_second=round(stats.generated_tokens / now, 1),
        pause_mean=round(float(np.mean(list(pauses.values()))), 3),
        pause_p99=round(float(np.percentile(list(pauses.values()), 99)), 3),
    )


def compare(requests: int, blocks: int, seed: int, prompt_tokens: float = 33.0) -> dict[str, Outcome]:
    submits = workload(requests, prompt_tokens, seed)
    return {mode: run(mode, submits, blocks) for mode in RESERVE_OUTPUT}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=301, help="of 16 tokens; one of them is the null block")
    parser.add_argument("--prompt", type=float, default=33.0, help="tokens of the median prompt")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes = compare(options.requests, options.blocks, options.seed, options.prompt)
    if options.json:
        print(json.dumps({mode: asdict(outcome) for mode, outcome in outcomes.items()}))
        return 0
    names = list(Outcome.__dataclass_fields__)
    print(f"{'reserve':>9} " + " ".join(f"{name:>18}" for name in names))
    for mode, outcome in outcomes.items():
        print(f"{mode:>9} " + " ".join(f"{value:>18}" for value in asdict(outcome).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
