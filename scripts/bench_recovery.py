"""How long a stream pauses when a rank is lost: from the signal to the next token, with and without a spare group.

    python scripts/bench_recovery.py smollm2-135m --tensor-parallel-size 2 --faults 9 --json recovery.json
    python scripts/bench_recovery.py scripts/models/llama-3.1-8b --random-weights --tensor-parallel-size 2 \
        --device cuda --dtype bfloat16 --streams 64 --tokens 512 --faults 2 --json recovery.json   # two GPUs

Each fault is a SIGKILL to a random rank under `--streams` running streams. Every stream has to go on from the tokens
that it had, none lost or repeated, to its full length. All tokens are compared with those of an undisturbed run. In
float32 they must be equal. In bfloat16 sums are rounded in other places when a batch is another one, and what was
decoded token by token is prefilled at once after a fault, so near ties may fall differently: then it is only counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from treadle import LLM, SamplingParams

_SPARE_SECONDS = 600.0


@dataclass(frozen=True)
class Fault:
    """Seconds after the signal. next_token: of the first stream to go on; all_on: when every stream had gone on."""

    next_token: float
    all_on: float


@dataclass(frozen=True)
class Run:
    """standby: with a spare group. differing: streams whose tokens are not those of the undisturbed run, in all faults.
    broken: streams that lost or changed a token that their reader had, or ended early. seconds: to start.
    """

    standby: bool
    faults: list[Fault]
    differing: int
    broken: int
    streams: int
    start_seconds: float

    def summary(self) -> dict[str, object]:
        times = [fault.next_token for fault in self.faults]
        return {
            "standby": self.standby,
            "faults": len(times),
            "median_s": round(statistics.median(times), 3),
            "worst_s": round(max(times), 3),
            "median_all_s": round(statistics.median(fault.all_on for fault in self.faults), 3),
            "worst_all_s": round(max(fault.all_on for fault in self.faults), 3),
            "start_s": round(self.start_seconds, 1),
            "streams": self.streams,
            "broken_streams": self.broken,
            "differing_streams": self.differing,
        }


class Bench:
    """One service, faulted again and again."""

    def __init__(self, options: argparse.Namespace, llm: LLM, standby: bool, start_seconds: float) -> None:
        self._start_seconds = start_seconds
        self._broken = 0
        self._options = options
        self._llm = llm
        self._standby = standby
        self._random = random.Random(options.seed)

    def _params(self, i: int) -> SamplingParams:
        tokens = self._options.tokens
        return SamplingParams(temperature=float(i % 2), seed=i, max_tokens=tokens, ignore_eos=True)

    async def run(self) -> Run:
        prompts = [f"Story number {i}: once upon a time" for i in range(self._options.streams)]
        expected = [
            output.token_ids
            for output in await asyncio.gather(
                *(self._llm.generate(prompt, self._params(i)).final() for i, prompt in enumerate(prompts))
            )
        ]
        faults, differing = [], 0
        for _ in range(self._options.faults):
            await self._spare_ready()
            fault, tokens = await self._fault(prompts)
            faults.append(fault)
            differing += sum(got != wanted for got, wanted in zip(tokens, expected, strict=True))
        streams = self._options.streams * self._options.faults
        return Run(self._standby, faults, differing, self._broken, streams, self._start_seconds)

    async def _fault(self, prompts: list[str]) -> tuple[Fault, list[list[int]]]:
        struck = [0.0]
        went_on: list[float] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        kept = [True] * len(prompts)
        begun = asyncio.Semaphore(0)

        async def read(i: int) -> None:
            waits = True
            async for output in self._llm.generate(prompts[i], self._params(i)):
                if not tokens[i]:
                    begun.release()
                had, tokens[i] = tokens[i], output.outputs[0].token_ids
                kept[i] &= tokens[i][: len(had)] == had
                if struck[0] and waits and recoveries[0]:
                    waits = False
                    went_on.append(time.perf_counter() - struck[0])

        recoveries = [0]
        readers = [asyncio.create_task(read(i)) for i in range(len(prompts))]
        for _ in prompts:
            await begun.acquire()
        before = (await self._llm.stats()).recoveries
        struck[0] = time.perf_counter()
        os.kill(self._random.choice(self._llm.engine_pids), signal.SIGKILL)
        # What was committed before the signal may still arrive: only what comes after the recovery counts.
        while (await self._llm.stats()).recoveries == before:
            await asyncio.sleep(0.001)
        recoveries[0] = 1
        await asyncio.gather(*readers)
        whole = [len(got) == self._options.tokens for got in tokens]
        self._broken += sum(not (same and full) for same, full in zip(kept, whole, strict=True))
        return Fault(min(went_on), max(went_on)), tokens

    async def _spare_ready(self) -> None:
        async with asyncio.timeout(_SPARE_SECONDS):
            while self._standby and (await self._llm.health()).spare != "ready":
                await asyncio.sleep(0.05)


async def measure(options: argparse.Namespace, standby: bool) -> Run:
    began = time.perf_counter()
    async with LLM(
        options.model,
        tensor_parallel_size=options.tensor_parallel_size,
        device=options.device,
        dtype=options.dtype,
        random_weights=options.random_weights,
        standby=standby,
    ) as llm:
        return await Bench(options, llm, standby, time.perf_counter() - began).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--faults", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("standby", "cold"), help="one of the two")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    kinds = {"standby": [True], "cold": [False], None: [False, True]}[options.only]
    runs = [asyncio.run(measure(options, standby)) for standby in kinds]
    for run in runs:
        print(json.dumps(run.summary()))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(run) | run.summary() for run in runs], indent=1))
    exact = options.dtype == "float32"
    return 1 if any(run.broken or (exact and run.differing) for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
