"""The waves of `bench_guided.py` through vLLM, to be run beside ours on the same machine.

    python3 scripts/bench_guided_vllm.py --model DIR --backend guidance --rows 32,256 --json vllm.json

In an environment with vLLM, of which this uses the offline `LLM` with random weights, no prefix cache and compact JSON.
DIR: config.json and a tokenizer. Prompts, schemas, lengths, the order of the waves and how the overhead is computed are
those of `bench_guided.py`; its wave of every second row is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from guided_waves import PROMPT_TOKENS, SCHEMAS, prompts

KINDS = ("free", "guided")


def wave(llm: Any, kind: str, rows: int, seed: int, schema: str, options: argparse.Namespace) -> float:
    """Output tokens per second."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = []
    for row in range(rows):
        guided = None
        if kind == "guided":
            text = json.dumps(SCHEMAS[schema](row % options.schemas))
            guided = StructuredOutputsParams(json=text, disable_any_whitespace=True)
        params.append(
            SamplingParams(
                temperature=0.0,
                max_tokens=options.new_tokens,
                structured_outputs=guided,
                ignore_eos=guided is None,
                detokenize=False,
            )
        )
    tokens = [{"prompt_token_ids": ids} for ids in prompts(seed, rows, options.largest_id)]
    began = time.perf_counter()
    outputs = llm.generate(tokens, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    if count != rows * options.new_tokens:
        raise SystemExit(f"{kind}: {count} tokens instead of {rows * options.new_tokens}: not a comparison")
    return count / seconds


def overhead(llm: Any, schema: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    for kind in KINDS:
        wave(llm, kind, rows, 1, schema, options)  # warms up, compiles
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repetition in range(options.repetitions):
        for kind in KINDS:
            rates[kind].append(wave(llm, kind, rows, 1000 * (repetition + 2), schema, options))
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    return {
        "tokens_per_s": {kind: round(value, 1) for kind, value in medians.items()},
        "overhead_percent": round(100 * (1 - medians["guided"] / medians["free"]), 2),
        "all_tokens_per_s": {kind: [round(value, 1) for value in values] for kind, values in rates.items()},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import vllm

    llm = vllm.LLM(
        model=options.model,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=PROMPT_TOKENS + options.new_tokens + 16,
        max_num_seqs=max(options.rows),
        enable_prefix_caching=False,
        structured_outputs_config={"backend": options.backend, "disable_any_whitespace": True},
    )
    results: dict[str, Any] = {"vllm": vllm.__version__}
    for schema in options.schema:
        for rows in options.rows:
            results[f"{schema}_rows_{rows}"] = overhead(llm, schema, rows, options)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", default="guidance", choices=("guidance", "xgrammar"))
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--schema", type=lambda text: text.split(","), default=list(SCHEMAS), help="what of")
    parser.add_argument("--schemas", type=int, default=8, help="distinct ones")
    parser.add_argument("--largest-id", type=int, default=120_000, help="of a prompt's random tokens")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args()
    found = {"options": {name: str(value) for name, value in vars(options).items()}, **measure(options)}
    print(json.dumps(found, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
