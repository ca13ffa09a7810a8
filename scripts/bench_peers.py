"""SmolLM2-135M on CPUs beside OpenVINO GenAI, in one run: the same GGUF file, the same prompts, in turns.

    .venv/bin/python scripts/bench_peers.py [--rounds 3] [--concurrency 1,8,32] [--json FILE] [--peer-env DIR]

Each round starts one fresh process of each, one after the other, warms it up, and then sends waves of requests: 128
words of one token each, 128 new tokens, greedy, end of sequence ignored, no cached prefix. Figures are output tokens/s,
prefill included; medians and ratios are taken over the rounds, so a machine whose speed drifts treats both alike.
Both keep the file's 4-bit weights, ours for few rows only. The first run installs openvino-genai into --peer-env.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path

PEER = "openvino-genai==2026.4.1.0"
WORDS = (  # noqa: SIM905 - twenty-five quoted words are harder to read
    "time person year way day thing man world life hand part child eye woman place work week case point government "
    "company number group problem fact"
).split()
TOKENS = 128
Wave = Callable[[list[str]], None]


def prompts(count: int, seed: int) -> list[str]:
    source = random.Random(seed)
    return [" ".join(source.choice(WORDS) for _ in range(TOKENS)) for _ in range(count)]


def measure(wave: Wave, concurrency: list[int]) -> dict[str, float]:
    """Output tokens/s by concurrency; a warm-up of each first."""
    rates = {}
    for count in concurrency:
        wave(prompts(count, seed=count))
        began = time.perf_counter()
        wave(prompts(count, seed=1000 + count))
        rates[str(count)] = count * TOKENS / (time.perf_counter() - began)
    return rates


def ours(model: str, concurrency: list[int]) -> dict[str, float]:
    from treadle import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(model, tensor_parallel_size=2, dtype="bfloat16", prefix_cache=False, max_num_seqs=max(concurrency)) as llm:

        async def together(texts: list[str]) -> None:
            outputs = await asyncio.gather(*(llm.generate(text, params).final() for text in texts))
            lengths = {len(output.token_ids) for output in outputs}
            if lengths != {TOKENS}:
                raise RuntimeError(f"outputs of {lengths} tokens where {TOKENS} were asked for")

        return measure(lambda texts: asyncio.run(together(texts)), concurrency)


def openvino(model: str, concurrency: list[int]) -> dict[str, float]:
    import openvino_genai  # type: ignore[import-not-found]

    scheduling = openvino_genai.SchedulerConfig()
    scheduling.max_num_seqs = max(concurrency)
    scheduling.max_num_batched_tokens = 2048
    scheduling.enable_prefix_caching = False
    scheduling.cache_size = 1  # GiB
    pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduling)
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = TOKENS
    config.ignore_eos = True
    config.do_sample = False
    config.apply_chat_template = False
    return measure(lambda texts: pipeline.generate(texts, config), concurrency)


def peer_python(directory: Path) -> Path:
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", PEER], check=True)
    return python


def child(python: Path | str, name: str, model: str, concurrency: str) -> dict[str, float]:
    command = [str(python), str(Path(__file__).resolve()), "--child", name, "--model", model]
    done = subprocess.run([*command, "--concurrency", concurrency], stdout=subprocess.PIPE, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name.ljust(10), " ".join(f"{count}: {rate:.1f}" for count, rate in rates.items()), file=sys.stderr)
    return rates


def compare(options: argparse.Namespace) -> dict[str, object]:
    from treadle.models import resolve_model

    model, peer = str(resolve_model("smollm2-135m")), peer_python(options.peer_env)
    rounds = [
        {name: child(python, name, model, options.concurrency) for name, python in pair}
        for pair in [[("treadle", sys.executable), ("openvino", peer)]] * options.rounds
    ]
    summary: dict[str, object] = {"rounds": rounds, "load": os.getloadavg()[0]}
    for count in options.concurrency.split(","):
        mine = [a_round["treadle"][count] for a_round in rounds]
        theirs = [a_round["openvino"][count] for a_round in rounds]
        summary[f"concurrency_{count}"] = {
            "treadle_tokens_per_s": round(statistics.median(mine), 1),
            "openvino_tokens_per_s": round(statistics.median(theirs), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(mine, theirs, strict=True)), 3),
        }
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--peer-env", type=Path, default=Path("build/peer-openvino"), help="its own environment")
    parser.add_argument("--child", choices=("treadle", "openvino"), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = ours if options.child == "treadle" else openvino
        print(json.dumps(run(options.model, [int(count) for count in options.concurrency.split(",")])))
        return 0
    found = compare(options)
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
