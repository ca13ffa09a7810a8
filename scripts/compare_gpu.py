"""A table of ours against vLLM's, with the physical limit beside each line.

    python scripts/compare_gpu.py --ours OURS.jsonl --theirs VLLM.jsonl --limits LIMITS.json --model-config DIR

Limits, from the measured copy bandwidth and matrix rate and the least work a step can do:
  decode N     (weights but the embedding, once, + keys and values of N contexts) / bandwidth, or the products of N
               tokens / matrix rate if that is longer; the context halfway through the new tokens
  prefill L    the products of L tokens (the head's for one) and causal attention / matrix rate, or the weights /
               bandwidth if that is longer
  throughput   the same sums over all requests: all products / matrix rate + all decoded keys and values / bandwidth;
               weights are left out, since how often they are read depends on the batch
A tensor-parallel group has the bandwidth and the rate of its GPUs together. The last column is how much of the limit
ours reaches. A ratio above 1 is ours ahead, in times as in rates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder in bfloat16. layer_weights, head_weights: elements that a token is multiplied with."""

    layers: int
    q_width: int
    layer_weights: int
    head_weights: int
    kv_bytes_per_token: int

    @property
    def weight_bytes(self) -> int:
        return 2 * (self.layer_weights + self.head_weights)


@dataclass(frozen=True, slots=True)
class Limits:
    """bandwidth: bytes/s; rate: FLOP/s; of the whole group."""

    bandwidth: float
    rate: float

    def decode(self, shape: Shape, batch: int, context: float) -> float:
        """Seconds of a step."""
        moved = shape.weight_bytes + batch * context * shape.kv_bytes_per_token
        return max(moved / self.bandwidth, 2 * batch * (shape.layer_weights + shape.head_weights) / self.rate)

    def prefill(self, shape: Shape, length: int) -> float:
        """Seconds of one prompt alone."""
        return max(self.products(shape, length), shape.weight_bytes / self.bandwidth)

    def products(self, shape: Shape, length: int) -> float:
        # Query times key and weight times value, 2 FLOP each, over half of the square: the mask is causal.
        attention = 4 * shape.layers * shape.q_width * length * length / 2
        return (2 * length * shape.layer_weights + 2 * shape.head_weights + attention) / self.rate

    def throughput(self, shape: Shape, lengths: Sequence[tuple[int, int]]) -> float:
        """Seconds for all requests."""
        total = 0.0
        for prompt, output in lengths:
            seen = output * (prompt + output / 2)
            total += self.products(shape, prompt) + seen * shape.kv_bytes_per_token / self.bandwidth
            total += 2 * output * (shape.layer_weights + shape.head_weights) / self.rate
        return total


def shape_of(config: Record) -> Shape:
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    kv = config["num_key_value_heads"] * dim
    layer = hidden * (heads * dim + 2 * kv) + heads * dim * hidden + 3 * hidden * config["intermediate_size"]
    return Shape(layers, heads * dim, layers * layer, hidden * config["vocab_size"], 2 * 2 * layers * kv)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def medians(records: Sequence[Record], tp: int) -> dict[tuple[str, object], float]:
    """(mode, what) to the median of its runs: milliseconds or tokens per second."""
    values: dict[tuple[str, object], list[float]] = defaultdict(list)
    for record in records:
        if record.get("tp", 1) != tp or "error" in record:
            continue
        mode = record["mode"]
        if mode == "throughput":
            values[mode, record["dataset"]].append(record["output_tok_s"])
        elif mode == "latency":
            values[mode, record["batch"]].append(record["step_ms_median"])
        elif mode == "ttft":
            values[mode, record["input_len"]].append(record["ttft_ms_median"])
        elif mode == "start":
            values[mode, ""].append(record["start_s"])
    return {key: statistics.median(found) for key, found in values.items()}


def limit_of(record: Record, shape: Shape, limits: Limits, lengths: Sequence[tuple[int, int]]) -> float | None:
    """In the unit of the record's figure."""
    if record["mode"] == "latency":
        return limits.decode(shape, record["batch"], record["context"] + record["output_len"] / 2) * 1e3
    if record["mode"] == "ttft":
        return limits.prefill(shape, record["input_len"]) * 1e3
    if record["mode"] == "throughput" and lengths:
        chosen = [lengths[index % len(lengths)] for index in range(record["num_prompts"])]
        return sum(output for _, output in chosen) / limits.throughput(shape, chosen)
    return None


def table(
    ours: Sequence[Record], theirs: Sequence[Record], limit: Callable[[Record], float | None], tp: int
) -> list[str]:
    mine, other = medians(ours, tp), medians(theirs, tp)
    units = {"throughput": "output tok/s", "latency": "ms/step", "ttft": "ms", "start": "s"}
    lines = ["| | ours | vLLM | ratio | limit | of the limit |", "|---|---|---|---|---|---|"]
    seen: set[tuple[str, object]] = set()
    for record in ours:
        mode = record["mode"]
        key = (mode, record.get("batch") or record.get("input_len") or record.get("dataset") or "")
        if key in seen or key not in mine:
            continue
        seen.add(key)
        value, peer, bound = mine[key], other.get(key), limit(record)
        faster_is_more = mode == "throughput"
        ratio = "" if peer is None else f"{(value / peer if faster_is_more else peer / value):.2f}"
        reached = "" if bound is None else f"{(value / bound if faster_is_more else bound / value):.0%}"
        lines.append(
            f"| {mode} {key[1]}, {units[mode]} | {value:,.2f} | {'' if peer is None else f'{peer:,.2f}'} | {ratio} "
            f"| {'' if bound is None else f'{bound:,.2f}'} | {reached} |"
        )
    return lines


def speed_ups(ours: Sequence[Record], tp: int, base: int) -> list[str]:
    """What more GPUs bring: ours at `tp` over ours at `base`."""
    many, few = medians(ours, tp), medians(ours, base)
    lines = [f"| ours | TP{base} | TP{tp} | speed-up |", "|---|---|---|---|"]
    for key in many.keys() & few.keys() - {("start", "")}:
        ratio = many[key] / few[key] if key[0] == "throughput" else few[key] / many[key]
        lines.append(f"| {key[0]} {key[1]} | {few[key]:,.2f} | {many[key]:,.2f} | {ratio:.2f} |")
    return lines[:2] + sorted(lines[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--theirs", type=Path, required=True)
    parser.add_argument("--limits", type=Path, required=True)
    parser.add_argument("--model-config", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, help="the lengths of the throughput runs")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--speed-up-over", type=int, metavar="TP", help="and what ours gains over this group size")
    options = parser.parse_args()
    tp = options.tensor_parallel_size
    measured = read(options.limits)[-1]
    limits = Limits(measured["copy_tb_s"] * 1e12 * tp, measured["bf16_tflop_s"] * 1e12 * tp)
    shape = shape_of(json.loads((options.model_config / "config.json").read_text()))
    lengths = [] if options.dataset is None else [(a, b) for a, b in map(json.loads, options.dataset.open())]
    print(
        f"{options.model_config.name}, random weights, TP{tp}, {measured['gpu']}: "
        f"{measured['copy_tb_s']} TB/s copied, {measured['bf16_tflop_s']} TFLOP/s in bf16\n"
    )
    ours, theirs = read(options.ours), read(options.theirs)
    print("\n".join(table(ours, theirs, lambda record: limit_of(record, shape, limits, lengths), tp)))
    if options.speed_up_over is not None:
        print("\n" + "\n".join(speed_ups(ours, tp, options.speed_up_over)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
