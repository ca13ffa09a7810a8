"""Our Triton kernels on one GPU, each beside the time that its bytes or its multiplications need at least.

    python scripts/bench_kernels.py [--json FILE] [--block-sizes 16,64] [--only decode,prefill,elementwise,host]

Shapes of Llama 3.1 8B and Qwen3 0.6B, bfloat16. Floors are of this GPU, measured first: a copy within its memory (what
is read plus what is written) and a product of random 8192 x 8192 matrices. A time is that of one launch in a replayed
graph of many, over inputs that rotate and together exceed the L2 cache; the median of several replays. `share` is floor
over time. Attention runs in several variants, of which the first is what the engine takes; `error` compares them.
One JSON object per line on stdout, appended to FILE too; a table of the best and the taken variants comes last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treadle.engine.kernels.decode import (
    DecodeConfig,
    choose_splits,
    decode_config,
    decode_workspace,
    paged_decode,
)
from treadle.engine.kernels.elementwise import TritonOps, silu_mul
from treadle.engine.kernels.prefill import PrefillConfig, paged_prefill, prefill_config
from treadle.engine.kernels.rope import rope_store
from treadle.engine.ops import HeadLayout, KVSlots

DTYPE = torch.bfloat16
DIM, KV_HEADS, MAX_CONTEXT = 128, 8, 8192
POOL_TOKENS = 256 * MAX_CONTEXT + 4096
ROTATE_BYTES = 200 << 20
TOKENS = (1, 32, 256, 2048, 8192)
DECODES = [(rows, context) for context in (128, 1024, 8192) for rows in (1, 8, 32, 64, 256)]
DECODE_CONFIGS = [DecodeConfig(64, 4, 4), DecodeConfig(128, 8, 3), DecodeConfig(32, 4, 4)]
PREFILLS = [(1, 512, 0), (1, 2048, 0), (1, 8192, 0), (1, 32768, 0), (1, 2048, 30720), (16, 512, 0), (32, 16, 1024)]
PREFILL_CONFIGS = [
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 128, 8, 3),
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(64, 64, 4, 3),
]

Report = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    hidden: int
    inner: int
    q_heads: int
    qk_norm: bool


MODELS = [Model("8b", 4096, 14336, 32, False), Model("0.6b", 1024, 3072, 16, True)]


def milliseconds(replay: Call, repeats: int = 7) -> float:
    times = []
    for turn in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def in_graph(calls: list[Call], least: int = 16) -> float:
    """Microseconds of one of `calls`, which run after one another, all of them as often as it takes."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-least // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    took = milliseconds(graph.replay)
    graph.reset()
    return took * 1e3 / (rounds * len(calls))


def sets_for(size: int) -> int:
    return max(1, min(32, -(-ROTATE_BYTES // max(size, 1))))


class Floor:
    """What this GPU does at most."""

    def __init__(self) -> None:
        source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        self.bytes_per_us = 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e3
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=DTYPE) for _ in range(2))
        self.flop_per_us = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e3
        one = torch.zeros(32, device="cuda")
        self.launch_us = in_graph([lambda: one.add_(1)], least=256)

    def report(self) -> Report:
        return {
            "gpu": torch.cuda.get_device_name(),
            "copy_tb_s": round(self.bytes_per_us / 1e6, 2),
            "bf16_tflop_s": round(self.flop_per_us / 1e6),
            "empty_launch_us": round(self.launch_us, 2),
        }

    def judge(self, us: float, moved: float, flop: float = 0) -> Report:
        floor = max(moved / self.bytes_per_us, flop / self.flop_per_us)
        return {"us": round(us, 2), "floor_us": round(floor, 2), "share": round(floor / us, 3)}


def random_rows(rows: int, columns: int, count: int) -> list[Tensor]:
    return list(torch.randn(count, rows, columns, device="cuda", dtype=DTYPE).unbind(0))


def elementwise_case(floor: Floor, model: Model, tokens: int) -> Iterator[Report]:
    ops = TritonOps()
    about = {"kernel": "", "model": model.name, "tokens": tokens, "variant": "default"}

    row = tokens * model.hidden * 2
    weight = torch.randn(model.hidden, device="cuda", dtype=DTYPE)
    x, residual = (random_rows(tokens, model.hidden, sets_for(4 * row)) for _ in range(2))
    us = in_graph([partial(ops.rms_norm, a, weight, 1e-6) for a in x])
    yield about | {"kernel": "rms_norm"} | floor.judge(us, 2 * row)
    us = in_graph([partial(ops.add_rms_norm, a, b, weight, 1e-6) for a, b in zip(x, residual, strict=True)])
    yield about | {"kernel": "add_rms_norm"} | floor.judge(us, 4 * row)

    size = tokens * model.inner * 2
    gates = random_rows(tokens, 2 * model.inner, sets_for(3 * size))
    for block, warps in ((1024, 4), (2048, 4), (512, 2)):
        us = in_graph([partial(silu_mul, a, block=block, warps=warps) for a in gates])
        yield about | {"kernel": "silu_mul", "variant": f"block {block}, {warps} warps"} | floor.judge(us, 3 * size)

    size = tokens * (model.q_heads + 2 * KV_HEADS) * DIM * 2
    wide = random_rows(tokens, size // tokens // 2, sets_for(2 * size))
    head = torch.randn(DIM, device="cuda", dtype=DTYPE) if model.qk_norm else None
    layout = HeadLayout(model.q_heads, KV_HEADS, DIM, 1e-6, head, head)
    angles = torch.rand(MAX_CONTEXT, DIM // 2, device="cuda") * 6
    rope, positions = (angles.cos(), angles.sin()), torch.randint(0, MAX_CONTEXT, (tokens,), device="cuda")
    cache = torch.zeros(2, 8192, KV_HEADS, 16, DIM, device="cuda", dtype=DTYPE)
    target = KVSlots(cache[0], cache[1], torch.randperm(8192 * 16, device="cuda")[:tokens])
    for elements in (1024, 512, 2048):
        us = in_graph([partial(rope_store, a, layout, rope, positions, target, elements=elements) for a in wide])
        yield about | {"kernel": "rope_store", "variant": f"{elements} elements"} | floor.judge(us, 2 * size)


class Pool:
    """Random keys and values, and disjoint tables over it."""

    def __init__(self, block_size: int) -> None:
        blocks = POOL_TOKENS // block_size
        shape = (blocks, KV_HEADS, block_size, DIM)
        self.block_size = block_size
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
        self._order = (torch.randperm(blocks - 1, device="cuda") + 1).int()

    def tables(self, rows: int, context: int) -> list[Tensor]:
        """As many as rotation needs and the pool has room for."""
        pages = -(-context // self.block_size)
        count = min(sets_for(rows * context * KV_HEADS * DIM * 4), self._order.numel() // (rows * pages))
        return list(self._order[: count * rows * pages].view(count, rows, pages).unbind(0))


def error_of(found: Tensor, reference: Tensor | None) -> float:
    return 0.0 if reference is None else float((found - reference).float().norm() / reference.float().norm())


def decode_cases() -> Iterator[tuple[str, list[int]]]:
    """Name and contexts: equal ones, and such as people have."""
    for rows, context in DECODES:
        yield f"{rows} x {context}", [context] * rows
    dice = random.Random(1)
    for rows in (64, 256):
        yield f"{rows} ragged", [min(int(dice.expovariate(1 / 700)) + 20, 4096) for _ in range(rows)]


def decode_variants(rows: int) -> list[tuple[DecodeConfig, int]]:
    """Tiles and splits; first what the engine takes in a graph, where contexts may become long."""
    usual = choose_splits(rows, KV_HEADS, MAX_CONTEXT, torch.cuda.get_device_properties(0).multi_processor_count)
    taken = decode_config(DIM, DTYPE)
    others = {1, 2, max(usual // 2, 1), min(2 * usual, 2048 // rows, 64)} - {usual}
    variants = [(taken, splits) for splits in (usual, *sorted(others))]
    return variants + [(config, usual) for config in DECODE_CONFIGS if config != taken]


def decode_case(
    floor: Floor, pool: Pool, model: Model, name: str, contexts: list[int], variants: list[tuple[DecodeConfig, int]]
) -> Iterator[Report]:
    rows = len(contexts)
    workspace = decode_workspace(1024, model.q_heads, DIM, 64, torch.device("cuda"))
    tables = pool.tables(rows, max(contexts))
    lengths = torch.tensor(contexts, dtype=torch.int32, device="cuda")
    index = torch.arange(rows, dtype=torch.int32, device="cuda")
    wide = torch.randn(rows, model.q_heads + 2 * KV_HEADS, DIM, device="cuda", dtype=DTYPE)
    q, out = wide[:, : model.q_heads], wide.new_empty(rows, model.q_heads * DIM)
    moved = sum(contexts) * KV_HEADS * DIM * 4 + 2 * out.nbytes
    reference: Tensor | None = None

    def call(table: Tensor, config: DecodeConfig, splits: int) -> None:
        paged_decode(
            q, pool.k, pool.v, table, index, lengths, out,
            scale=DIM**-0.5, window=None, num_splits=splits, workspace=workspace, config=config,
        )  # fmt: skip

    for config, splits in variants:
        us = in_graph([partial(call, table, config, splits) for table in tables], least=8)
        call(tables[0], config, splits)
        about = {"kernel": "decode", "model": model.name, "block_size": pool.block_size, "case": name}
        about["variant"] = f"{config.keys} keys, {config.warps} warps, {config.stages} stages, {splits} splits"
        yield about | {"error": error_of(out, reference)} | floor.judge(us, moved)
        reference = out.clone() if reference is None else reference


def prefill_case(
    floor: Floor, pool: Pool, model: Model, rows: int, queries: int, prefix: int, variants: list[PrefillConfig]
) -> Iterator[Report]:
    context, tokens = prefix + queries, rows * queries
    tables = pool.tables(rows, context)[:4]
    lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
    index = torch.arange(rows, dtype=torch.int32, device="cuda")
    starts = torch.arange(0, tokens + 1, queries, dtype=torch.int32, device="cuda")
    wide = torch.randn(tokens, model.q_heads + 2 * KV_HEADS, DIM, device="cuda", dtype=DTYPE)
    q, out = wide[:, : model.q_heads], wide.new_empty(tokens, model.q_heads * DIM)
    flop = 4 * DIM * model.q_heads * tokens * (prefix + (queries + 1) / 2)
    moved = rows * context * KV_HEADS * DIM * 4 + 2 * out.nbytes
    reference: Tensor | None = None

    def call(table: Tensor, config: PrefillConfig) -> None:
        paged_prefill(
            q, pool.k, pool.v, table, index, starts, lengths, queries, out,
            scale=DIM**-0.5, window=None, config=config,
        )  # fmt: skip

    for config in variants:
        us = in_graph([partial(call, table, config) for table in tables], least=4)
        call(tables[0], config)
        about = {"kernel": "prefill", "model": model.name, "block_size": pool.block_size}
        about["case"] = f"{rows} x {queries}" + (f" after {prefix}" if prefix else "")
        about["variant"] = f"{config.pairs} pairs, {config.keys} keys, {config.warps} warps, {config.stages} stages"
        rates = {"tflop_s": round(flop / us / 1e6), "error": error_of(out, reference)}
        yield about | rates | floor.judge(us, moved, flop)
        reference = out.clone() if reference is None else reference


def attention(floor: Floor, pool: Pool, every_variant: bool, only: list[str]) -> Iterator[Report]:
    for model in MODELS:
        if "decode" in only:
            for name, contexts in decode_cases():
                splittings = decode_variants(len(contexts))
                yield from decode_case(
                    floor, pool, model, name, contexts, splittings if every_variant else splittings[:1]
                )
        if "prefill" in only:
            for rows, queries, prefix in PREFILLS:
                taken = prefill_config(DIM, DTYPE, queries * model.q_heads // KV_HEADS)
                tiles = [taken, *(config for config in PREFILL_CONFIGS if config != taken)]
                yield from prefill_case(
                    floor, pool, model, rows, queries, prefix, tiles if every_variant else tiles[:1]
                )


def host() -> Iterator[Report]:
    """What launching costs the host, without a graph."""
    ops, calls = TritonOps(), 300
    x, weight = torch.randn(1, 1024, device="cuda", dtype=DTYPE), torch.randn(1024, device="cuda", dtype=DTYPE)
    cache = torch.randn(9, KV_HEADS, 16, DIM, device="cuda", dtype=DTYPE)
    table, zero = torch.ones(1, 8, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    q, out = torch.randn(1, 16, DIM, device="cuda", dtype=DTYPE), torch.empty(1, 16 * DIM, device="cuda", dtype=DTYPE)
    matrix = torch.randn(1024, 1024, device="cuda", dtype=DTYPE)

    def attend() -> None:
        paged_decode(q, cache, cache, table, zero, zero + 100, out, scale=0.1, window=None, num_splits=1)

    actions: dict[str, Call] = {
        "rms_norm": lambda: ops.rms_norm(x, weight, 1e-6),
        "paged_decode": attend,
        "matmul (torch)": lambda: x @ matrix,
    }
    for name, action in actions.items():
        action()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            action()
        took = (time.perf_counter() - begin) / calls * 1e6
        torch.cuda.synchronize()
        yield {"kernel": "host", "case": name, "host_us": round(took, 1)}


def everything(only: list[str], block_sizes: list[int]) -> Iterator[Report]:
    floor = Floor()
    yield floor.report()
    if "host" in only:
        yield from host()
    if "elementwise" in only:
        for model, tokens in product(MODELS, TOKENS):
            yield from elementwise_case(floor, model, tokens)
    for block_size in block_sizes:
        torch.cuda.empty_cache()
        yield from attention(floor, Pool(block_size), block_size == block_sizes[0], only)


def table_of(reports: list[Report]) -> str:
    """What the engine takes, and the best variant where it is more than 3% faster."""
    groups: dict[tuple[object, ...], list[Report]] = {}
    for report in reports:
        if "share" in report:
            names = ("kernel", "model", "block_size", "tokens", "case")
            groups.setdefault(tuple(report[name] for name in names if name in report), []).append(report)
    lines = []
    for key, found in groups.items():
        best, taken = min(found, key=lambda report: float(report["us"])), found[0]
        line = f"{' '.join(map(str, key)):38} {taken['us']:10.2f} us, floor {taken['floor_us']:10.2f}"
        line += f", {taken['share']:6.1%}"
        if best["us"] < 0.97 * taken["us"]:
            line += f"; {best['us']:.1f} us with {best['variant']}"
        lines.append(line)
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--block-sizes", type=lambda text: [int(part) for part in text.split(",")], default=[16, 64])
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=["decode", "prefill", "elementwise", "host"]
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")

    reports: list[Report] = []
    with torch.inference_mode():
        for report in everything(options.only, options.block_sizes):
            reports.append(report)
            line = json.dumps(report)
            print(line, flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(line + "\n")
    print(table_of(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
