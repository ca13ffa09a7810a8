"""What it costs to move KV blocks to host memory and back, and what it saves.

    python scripts/bench_swap.py --device cuda --model-config llama-3.1-8b --json swap.json
    python scripts/bench_swap.py --device cpu --json swap.json

  bandwidth   blocks out to host memory and in again, per size of a block and number of blocks in one plan; GB/s and
              microseconds per block, best of --repeats.
  crossover   wall time of a prompt whose blocks were evicted to host memory, until its one token, beside the same
              length computed anew; and the length from which the first is shorter.
  throughput  requests that need --overcommit times the cache, all at once, under each of --preemption; generated tokens
              over the wall time, and how much was preempted, computed again, moved.

THE WEIGHTS ARE RANDOM: shapes are real, answers mean nothing. Greedy, end of sequence ignored. Progress on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models"
BLOCK = 16
SMALL = {  # the shape of SmolLM2-135M
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
Result = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--model-config", help="directory with config.json, or a name in models/ (default: by device)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["bandwidth", "crossover", "throughput"])
    parser.add_argument("--preemption", type=lambda text: text.split(","), default=["swap", "auto", "recompute"])
    parser.add_argument("--block-sizes", type=integers, default=[16, 32, 64])
    parser.add_argument("--blocks", type=integers, default=[1, 8, 64, 256])
    parser.add_argument("--lengths", type=integers, help="of prompts, for crossover (default: by device)")
    parser.add_argument("--requests", type=int, help="for throughput (default: by device)")
    parser.add_argument("--input-len", type=int, help="of each (default: by device)")
    parser.add_argument("--output-len", type=int, help="of each (default: by device)")
    parser.add_argument("--overcommit", type=float, default=2.5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, nargs="?", metavar="FILE", help="a copy of what is printed")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    options.lengths = options.lengths or ([64, 256, 1024, 4096] if gpu else [32, 64, 128, 256])
    options.requests = options.requests or (96 if gpu else 12)
    options.input_len = options.input_len or (512 if gpu else 64)
    options.output_len = options.output_len or (192 if gpu else 48)
    return options


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def model_directory(options: argparse.Namespace, scratch: Path) -> Path:
    name = options.model_config or ("llama-3.1-8b" if options.device == "cuda" else None)
    if name is None:
        (scratch / "config.json").write_text(json.dumps(SMALL))
        return scratch
    return Path(name) if Path(name).exists() else MODELS / name


def tell(text: str) -> None:
    print(f"[{time.perf_counter():7.1f}] {text}", file=sys.stderr, flush=True)


# ── bandwidth ────────────────────────────────────────────────────────────────────────────────────────────────────────


def bandwidth(options: argparse.Namespace, directory: Path) -> list[Result]:
    """Of one rank's blocks, without a model beside them."""
    import numpy as np
    import torch

    from treadle.engine.config import load_config
    from treadle.engine.host_memory import make_copies, reserve_staging
    from treadle.engine.kv import KVCache, bytes_per_block
    from treadle.engine.sharding import shard_for
    from treadle.scheduler.setup import resolve_dtype

    torch.set_num_threads(1)  # as a rank has by default
    config = load_config(directory)
    device = torch.device(options.device)
    dtype = getattr(torch, resolve_dtype(options.dtype, options.device))
    shard = shard_for(config, 0, 1)
    found: list[Result] = []
    for block_size in options.block_sizes:
        size = bytes_per_block(config, shard, block_size, dtype)
        most = max(options.blocks)
        kv = KVCache(config, shard, num_blocks=most + 1, block_size=block_size, dtype=dtype, device=device)
        staging = reserve_staging(most, size, device) if device.type == "cuda" else None
        copies = make_copies(kv, most, staging, poison=False)
        places = np.random.default_rng(0).permutation(most).astype(np.int32)
        for count in options.blocks:
            device_blocks, host = np.arange(1, count + 1, dtype=np.int32), np.sort(places[:count])
            times: dict[str, list[float]] = {"out": [], "in": []}
            for _ in range(options.repeats + 1):
                for way in ("out", "in"):
                    began = time.perf_counter()
                    if way == "out":
                        copies.copy_out(np.stack((device_blocks, host), 1))
                    else:
                        copies.copy_in(np.stack((host, device_blocks), 1))
                    copies.wait()
                    times[way].append(time.perf_counter() - began)
            row: Result = {"block_size": block_size, "block_bytes": size, "blocks": count}
            for way, seconds in times.items():
                best = min(seconds[1:])
                row[f"{way}_gb_per_s"] = round(count * size / best / 1e9, 2)
                row[f"{way}_us_per_block"] = round(best / count * 1e6, 2)
            found.append(row)
            tell(f"bandwidth {row}")
        del kv, staging, copies
    return found


# ── through the service ──────────────────────────────────────────────────────────────────────────────────────────────


class Served:
    """One service with a small cache and much host memory."""

    def __init__(self, options: argparse.Namespace, directory: Path, preemption: str) -> None:
        from treadle import LLM

        vocab = int(json.loads((directory / "config.json").read_text())["vocab_size"])
        self._options = options
        self._random = random.Random(0)
        self._vocab = vocab
        tokens = options.requests * (options.input_len + options.output_len)
        longest = max(*options.lengths, options.input_len + options.output_len)
        blocks = max(int(tokens / options.overcommit / BLOCK), longest // BLOCK + 8)
        self.num_blocks = blocks
        self.llm = LLM(
            str(directory),
            device=options.device,
            dtype=options.dtype,
            random_weights=True,
            block_size=BLOCK,
            num_blocks=blocks,
            swap_blocks=(tokens + longest) // BLOCK,
            preemption=preemption,
            reserve_output="none",
            max_model_len=longest + 64,
            max_num_seqs=options.requests,
            max_num_batched_tokens=4096 if options.device == "cuda" else 512,
        )

    def prompt(self, length: int) -> list[int]:
        return [self._random.randrange(self._vocab) for _ in range(length)]

    async def crossover(self) -> Result:
        rows = [await self._at(length) for length in self._options.lengths]
        faster = [row["length"] for row in rows if row["swap_in_s"] < row["recompute_s"]]
        return {"lengths": rows, "swap_in_is_faster_from": min(faster, default=None)}

    async def _at(self, length: int) -> Result:
        """A prompt computed, evicted by others, and asked for again."""
        cold, warm, back = [], [], 0
        for _ in range(self._options.repeats + 1):
            prompt = self.prompt(length)
            cold.append(await self._one(prompt))
            filled = 0
            while filled < self.num_blocks * BLOCK:
                filled += await self._fill()
            before = (await self.llm.stats()).swapped_in_blocks
            warm.append(await self._one(prompt))
            back = (await self.llm.stats()).swapped_in_blocks - before
        row = {
            "length": length,
            "recompute_s": statistics.median(cold[1:]),
            "swap_in_s": statistics.median(warm[1:]),
            "blocks_in": back,
        }
        tell(f"crossover {row}")
        return row

    async def _one(self, prompt: list[int], tokens: int = 1) -> float:
        from treadle import SamplingParams

        began = time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        await self.llm.generate(prompt, params).final()
        return time.perf_counter() - began

    async def _fill(self) -> int:
        length = max(self._options.lengths)
        await self._one(self.prompt(length))
        return length

    async def throughput(self, preemption: str) -> Result:
        options = self._options
        await self._one(self.prompt(options.input_len), 8)
        before = await self.llm.stats()
        prompts = [self.prompt(options.input_len) for _ in range(options.requests)]
        began = time.perf_counter()
        await asyncio.gather(*(self._one(prompt, options.output_len) for prompt in prompts))
        seconds = time.perf_counter() - began
        after = await self.llm.stats()
        row: Result = {
            "preemption": preemption,
            "seconds": round(seconds, 3),
            "tokens_per_s": round(options.requests * options.output_len / seconds, 1),
        }
        counters = ("preemptions", "swapped_preemptions", "recomputed_tokens", "swapped_out_blocks")
        for name in (*counters, "swapped_in_blocks", "cpu_evictions"):
            row[name] = getattr(after, name) - getattr(before, name)
        tell(f"throughput {row}")
        return row


async def served(options: argparse.Namespace, directory: Path, report: Result) -> None:
    for index, preemption in enumerate(options.preemption):
        tell(f"starting with preemption={preemption}")
        one = Served(options, directory, preemption)
        async with one.llm:
            if "throughput" in options.parts:
                report.setdefault("throughput", []).append(await one.throughput(preemption))
            if "crossover" in options.parts and not index:
                report["crossover"] = await one.crossover()
        if "throughput" not in options.parts:
            return


def main() -> int:
    options = parse()
    report: Result = {"device": options.device, "model": options.model_config or "default"}
    with tempfile.TemporaryDirectory() as scratch:
        directory = model_directory(options, Path(scratch))
        if "bandwidth" in options.parts:
            report["bandwidth"] = bandwidth(options, directory)
        if {"crossover", "throughput"} & set(options.parts):
            asyncio.run(served(options, directory, report))
    text = json.dumps(report, indent=1)
    if options.json is not None:
        options.json.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
