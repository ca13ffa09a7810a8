#!/usr/bin/env python
"""The simulator against a run: the same requests, served on CPUs and simulated with the costs learned from that run.

    .venv/bin/python scripts/calibrate_simulator.py [--json FILE] [--rates 1,2,3] [--seconds 60] [--ranks 2]

For each rate, requests arrive for so many seconds as a Poisson process, with random prompts and output lengths,
uniform in the ranges of --input and --output; greedy, end of sequence ignored. The service records an event log. From
it come the step costs, the configuration of the core and the arrivals as the scheduler saw them; with these the
simulator runs the same requests. Compared are output tokens/s (from the first arrival to the last token) and the
median time to the first token, as the program that reads the streams sees it; the error is of the simulated figure,
as a share of the measured one. Needs a quiet machine: what else runs changes the costs from second to second.
`load_average` tells how quiet it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from treadle import LLM, RequestOutput, SamplingParams
from treadle.scheduler.event_log import EventReader, Opened
from treadle.scheduler.recording import config_from_log
from treadle.scheduler.simulation import Fleet, Goals, Workload, build_report, costs_from_log, simulate
from treadle.scheduler.simulation.recorded import read_event_log
from treadle.scheduler.simulation.workload import make_workload

ORDINARY_IDS = (1000, 49_000)  # no special tokens
WARM_UP = 8


@dataclass(frozen=True)
class Measured:
    """Seconds of the run, and of each request."""

    seconds: float
    outputs: list[RequestOutput]

    def summary(self) -> dict[str, float]:
        tokens = sum(len(output.token_ids) for output in self.outputs)
        return {
            "output_tokens_per_s": tokens / self.seconds,
            "ttft_p50": statistics.median(output.ttft or 0.0 for output in self.outputs),
        }


def prompt(source: random.Random, lengths: tuple[int, int]) -> list[int]:
    return [source.randrange(*ORDINARY_IDS) for _ in range(source.randint(*lengths))]


def params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


async def measure(options: argparse.Namespace, rate: float, log: Path) -> Measured:
    """Serves the requests; the warm-up before is in the log too, and teaches the cost model its extremes."""
    source = random.Random(options.seed)
    async with LLM(
        options.model, tensor_parallel_size=options.ranks, max_num_seqs=options.max_num_seqs, event_log=str(log)
    ) as llm:
        warm_up = [llm.generate(prompt(source, options.input), params(options.output[1])) for _ in range(WARM_UP)]
        await asyncio.gather(*(stream.final() for stream in warm_up))
        began = time.perf_counter()
        due, running = began, []
        for _ in range(max(1, round(rate * options.seconds))):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            stream = llm.generate(prompt(source, options.input), params(source.randint(*options.output)))
            running.append(asyncio.create_task(stream.final()))
            due += source.expovariate(rate)
        outputs = await asyncio.gather(*running)
        return Measured(time.perf_counter() - began, outputs)


def without_warm_up(recorded: Workload) -> Workload:
    left = recorded.take(np.arange(WARM_UP, len(recorded)))
    arrival = left.arrival - left.arrival[0]
    return make_workload(arrival, left.inputs, left.outputs, prompts=left.prompts)


def simulated(log: Path) -> dict[str, object]:
    """The same requests in virtual time, on the core as it was configured."""
    opened = [event for event in EventReader(log) if isinstance(event, Opened)]
    fleet = Fleet(config=config_from_log(opened[-1].config), costs=costs_from_log(log))
    workload = without_warm_up(read_event_log(log))
    report = build_report(fleet, workload, simulate(fleet, workload), Goals())
    return {
        "output_tokens_per_s": report["throughput"]["output_tokens"],
        "ttft_p50": report["ttft"]["p50"],
        "rows": report["engine"]["rows"],
        "busy": report["engine"]["busy"],
        "costs": msgspec.structs.asdict(fleet.costs),
    }


def calibrate(options: argparse.Namespace, rate: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "events"
        measured = asyncio.run(measure(options, rate, log)).summary()
        told = simulated(log)
    names = ("output_tokens_per_s", "ttft_p50")
    errors = {name: round(float(str(told[name])) / measured[name] - 1, 4) for name in names}
    return {
        "rate": rate,
        "measured": measured,
        "simulated": told,
        "error": errors,
        "within_10_percent": all(abs(error) <= 0.1 for error in errors.values()),
        "load_average": os.getloadavg()[0],
    }


def pair(text: str) -> tuple[int, int]:
    low, high = (int(part) for part in text.split(","))
    return low, high


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rates", type=numbers, default=[1.0, 2.0, 3.0], help="requests per second, by commas")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals at each rate")
    parser.add_argument("--input", type=pair, default=(32, 128), metavar="LOW,HIGH", help="tokens of a prompt")
    parser.add_argument("--output", type=pair, default=(16, 64), metavar="LOW,HIGH", help="tokens of an answer")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    runs = []
    for rate in options.rates:
        runs.append(calibrate(options, rate))
        shares = ", ".join(f"{name} {error:+.1%}" for name, error in runs[-1]["error"].items())
        print(f"{rate:g} requests/s: {shares}", file=sys.stderr)
    found = {"options": {name: str(value) for name, value in vars(options).items()}, "runs": runs}
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
