"""SmolLM2-135M on CPUs, end to end: throughput, TTFT, prefill rate, start-up and memory.

    .venv/bin/python scripts/bench_cpu.py [--json FILE] [--ranks 2] [--concurrency 1,8,32] [--repetitions 3]

Prompts are random token ids of 128 tokens, all different (so the prefix cache has nothing to give; it is off), 128 new
tokens, greedy, end of sequence ignored. Output tokens/s is all output tokens over the wall time from the first
submission to the last token, prefill included. Medians after a warm-up. Start-up is the wall time of a fresh process
from its start to its first token, `import treadle` and loading included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treadle import LLM, RequestOutput, SamplingParams

PROMPT_TOKENS = 128
NEW_TOKENS = 128
PREFILL_TOKENS = 1024
ORDINARY_IDS = (1000, 49_000)  # no special tokens

FIRST_TOKEN_PROGRAM = """
import asyncio, sys, time
from treadle import LLM, SamplingParams
async def main():
    async with LLM(sys.argv[1], tensor_parallel_size=int(sys.argv[2]), dtype=sys.argv[3]) as llm:
        await anext(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=4)))
        print(time.time(), flush=True)
asyncio.run(main())
"""


def prompt(seed: int, length: int) -> list[int]:
    """Random ordinary token ids."""
    source = random.Random(seed)
    return [source.randrange(*ORDINARY_IDS) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


async def wave(llm: LLM, concurrency: int, seed: int) -> dict[str, float]:
    """`concurrency` requests at once, to the end of the last."""
    began = time.perf_counter()
    streams = [llm.generate(prompt(seed + i, PROMPT_TOKENS), greedy(NEW_TOKENS)) for i in range(concurrency)]
    outputs: Sequence[RequestOutput] = await asyncio.gather(*(stream.final() for stream in streams))
    seconds = time.perf_counter() - began
    firsts = [output.first_token_time or 0.0 for output in outputs]
    return {
        "output_tokens_per_s": sum(len(output.token_ids) for output in outputs) / seconds,
        "ttft_ms": statistics.median(output.ttft or 0.0 for output in outputs) * 1e3,
        # From the moment that all are decoding: what a step costs, prefill left out.
        "tpot_ms": (time.perf_counter() - max(firsts)) / (NEW_TOKENS - 1) * 1e3 if concurrency == 1 else 0.0,
    }


async def prefill(llm: LLM, seed: int) -> float:
    """Prompt tokens per second of one long prompt."""
    output = await llm.generate(prompt(seed, PREFILL_TOKENS), greedy(1)).final()
    return PREFILL_TOKENS / (output.ttft or float("inf"))


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {}
    async with LLM(
        options.model,
        tensor_parallel_size=options.ranks,
        dtype=options.dtype,
        prefix_cache=False,
        max_num_seqs=max(options.concurrency),
        native=options.native,
        pipeline_depth=options.pipeline_depth,
    ) as llm:
        await wave(llm, max(options.concurrency), 1)
        await prefill(llm, 2)
        for concurrency in options.concurrency:
            runs = [await wave(llm, concurrency, 1000 * (r + 1)) for r in range(options.repetitions)]
            results[f"concurrency_{concurrency}"] = {
                name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0] if runs[0][name]
            }
        rates = [await prefill(llm, 500_000 + r) for r in range(options.repetitions)]
        results["prefill_tokens_per_s"] = round(statistics.median(rates), 1)
        results["peak_memory_mib"] = {
            "scheduler": peak_mib(os.getpid()),
            "ranks": [peak_mib(pid) for pid in llm.engine_pids],
        }
    return results


def first_token_seconds(options: argparse.Namespace) -> float:
    """Wall seconds from the start of a fresh process to its first token."""
    began = time.time()
    command = [sys.executable, "-c", FIRST_TOKEN_PROGRAM, options.model, str(options.ranks), options.dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout) - began


def peak_mib(pid: int) -> int:
    """Peak resident memory of a process in MiB; weights and cache of a rank are its own, libraries are shared."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return 0


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next(line for line in lines if line.startswith("flags")).split()
    return {
        "cores": os.cpu_count(),
        "cpu": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""),
        "matrix_units": [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags],
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--native", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--pipeline-depth", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}}
    starts = [first_token_seconds(options) for _ in range(options.repetitions)]
    found["start_to_first_token_s"] = round(statistics.median(starts), 2)
    found |= asyncio.run(measure(options))
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
