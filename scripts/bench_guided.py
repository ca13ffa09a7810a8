"""What structured output costs: output tokens/s with and without a JSON schema, on the same engine in turn.

    .venv/bin/python scripts/bench_guided.py [--json FILE] [--rows 32] [--new-tokens 96] [--repetitions 5]
    .venv/bin/python scripts/bench_guided.py --device cuda --rows 32,256 --new-tokens 256    # on a GPU
    python3 scripts/bench_guided.py --device cuda --model DIR --random-weights --dtype bfloat16    # any shape

Each wave is `rows` requests at once with prompts of 64 random tokens, all different, and exactly `new-tokens` tokens of
output, greedy: the free ones ignore the end of sequence, the guided ones fill an array of objects that must be longer
than that. Waves come in the order free, guided, half (every second row is guided), and over again; a wave's rate is all
its output tokens over the wall time from the first submission to the last token. The overhead is one minus the median
rate over the median free rate. `schemas` are distinct, and all compiled before the first wave. The tokenizer's
end of sequence must be no ordinary token: a guided row that samples it ends early.

`masks` is the time from a step's tokens to its encoded masks (waiting for the thread included), which is hidden as long
as it is shorter than a forward pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guided_waves import PROMPT_TOKENS, SCHEMAS, prompts

from treadle import LLM, Guided, SamplingParams
from treadle.scheduler.guidance.guide import Guide
from treadle.scheduler.guidance.pending import MasksDue
from treadle.scheduler.guidance.rows import MadeMasks
from treadle.transport.mask_pages import MaskPages

KINDS = ("free", "guided", "half")


def _size(made: MadeMasks) -> int:
    masks = made.masks
    return sum(map(len, (masks.rows, masks.kinds, masks.counts, masks.places, masks.words, masks.bits)))


class MaskTimes:
    """Wraps a `Guide`'s method and takes the time of each step's masks, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self._made = Guide.make_masks

    def install(self) -> None:
        times, made = self, self._made

        def timed(guide: Guide, due: MasksDue, pages: MaskPages | None, done: Callable[[MadeMasks], None]) -> None:
            began = time.perf_counter()

            def finished(masks: MadeMasks) -> None:
                times.seconds.append(time.perf_counter() - began)
                times.bytes.append(_size(masks))
                done(masks)

            made(guide, due, pages, finished)

        Guide.make_masks = timed  # type: ignore[method-assign]

    def report(self) -> dict[str, float]:
        if not self.seconds:
            return {}
        ordered = sorted(self.seconds)
        found = {
            "p50_ms": round(statistics.median(ordered) * 1e3, 3),
            "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 3),
            "p50_bytes": float(statistics.median(self.bytes)),
        }
        self.seconds.clear()
        self.bytes.clear()
        return found


async def wave(llm: LLM, kind: str, rows: int, seed: int, options: argparse.Namespace) -> float:
    """Output tokens per second."""
    tokens = prompts(seed, rows, options.largest_id)
    began = time.perf_counter()
    streams = []
    for row, prompt in enumerate(tokens):
        guided = None
        if kind == "guided" or (kind == "half" and row % 2):
            guided = Guided(json=SCHEMAS[options.schema](row % options.schemas))
        params = SamplingParams(
            temperature=0.0, max_tokens=options.new_tokens, guided=guided, ignore_eos=guided is None
        )
        streams.append(llm.generate(prompt, params))
    outputs = await asyncio.gather(*(stream.final() for stream in streams))
    seconds = time.perf_counter() - began
    count = sum(len(output.token_ids) for output in outputs)
    if count != rows * options.new_tokens:
        raise SystemExit(f"{count} tokens instead of {rows * options.new_tokens}: not a comparison")
    return count / seconds


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    times = MaskTimes()
    times.install()
    results: dict[str, Any] = {}
    async with LLM(
        options.model,
        device=options.device,
        tensor_parallel_size=options.ranks,
        dtype=options.dtype,
        random_weights=options.random_weights,
        max_model_len=PROMPT_TOKENS + options.new_tokens,
        prefix_cache=False,
        max_num_seqs=max(options.rows),
        pipeline_depth=options.pipeline_depth,
        in_process=not options.own_process,
    ) as llm:
        for rows in options.rows:
            for kind in KINDS:
                await wave(llm, kind, rows, 1, options)  # warms up, compiles
            times.report()
            rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
            masks: dict[str, dict[str, float]] = {}
            for repetition in range(options.repetitions):
                for kind in KINDS:
                    rates[kind].append(await wave(llm, kind, rows, 1000 * (repetition + 2), options))
                    if kind != "free":
                        masks[kind] = times.report()
            medians = {kind: statistics.median(values) for kind, values in rates.items()}
            results[f"rows_{rows}"] = {
                "tokens_per_s": {kind: round(value, 1) for kind, value in medians.items()},
                "overhead_percent": {
                    kind: round(100 * (1 - medians[kind] / medians["free"]), 2) for kind in KINDS if kind != "free"
                },
                "masks": masks,
                "all_tokens_per_s": {kind: [round(value, 1) for value in values] for kind, values in rates.items()},
            }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--random-weights", action="store_true", help="of a directory with config and tokenizer alone")
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[32])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--schema", choices=SCHEMAS, default="strings", help="what objects are made of")
    parser.add_argument("--schemas", type=int, default=8, help="distinct ones")
    parser.add_argument("--largest-id", type=int, default=49_000, help="of a prompt's random tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--pipeline-depth", type=int, default=2)
    parser.add_argument("--own-process", action="store_true", help="of the scheduler; `masks` is not measured then")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    shown = {name: str(value) for name, value in vars(options).items()}
    found: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]},
        "options": shown,
        **asyncio.run(measure(options)),
    }
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
