"""Attention kernels on one GPU: our Triton kernels against FlashInfer's, prefill and decode.

    python scripts/bench_attention.py [--only prefill,decode,variants,linears] [--heads 32,8,128 16,8,128] [--json FILE]

Random bfloat16 numbers in scattered pages. Prefill: TFLOP/s of the causal half, medians of single calls after the L2
cache was swept. Decode: GB/s of the keys and values that must be read, one call of many in a replayed CUDA graph, over
caches that together exceed the L2 cache, with splits as the engine captures them. FlashInfer's decode is its
tensor-core kernel; its plan, made once per step on the host, is timed apart. Errors are against Triton's result.
Variants: decode in other tiles and splits, for the table in `engine/kernels/shapes.py`; a summary on stderr has the
best of each case, and what the engine takes. Linears: torch's products for few rows, in the sizes of Qwen3 0.6B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from treadle.engine.batch import ForwardBatch
from treadle.engine.flashinfer import flashinfer_attention, flashinfer_serves
from treadle.engine.flashinfer.backend import Heads
from treadle.engine.flashinfer.modules import load_module, prebuilt
from treadle.engine.kernels.decode import DecodeConfig, choose_splits, decode_config, decode_workspace, paged_decode
from treadle.engine.kernels.paged_attention import TritonAttention
from treadle.engine.kernels.shapes import sm_count

DTYPE = torch.bfloat16
PREFILLS = [(512, 0), (2048, 0), (8192, 0), (16384, 16384)]
DECODES = [(1, 1088), (8, 1088), (32, 1088), (64, 1088), (128, 1088), (256, 1088), (1, 32768), (16, 8192)]
MAX_MODEL_LEN = 8192
ROWS, CONTEXTS = (1, 8, 32, 64, 256), (128, 1088, 8192)
CONFIGS = [
    DecodeConfig(*tile, fused, programs)
    for tile in ((64, 4, 3), (128, 4, 2), (32, 4, 5))
    for fused in (True, False)
    for programs in (2, 3, 4)
]
# Out, in: of queries, keys and values; of attention's output; of gate and up; of down; of the head.
LINEARS = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)]
_ROTATE = 256 << 20
_WORKSPACE = 256 << 20
_SWEEP = 256 << 20


class Case:
    """`rows` rows of `context` tokens, of which the last `queries` are asked."""

    def __init__(self, heads: Heads, block_size: int, rows: int, context: int, queries: int) -> None:
        pages = -(-context // block_size)
        shape = (rows * pages + 1, heads.kv_heads, block_size, heads.head_dim)
        self.k, self.v = (torch.randn(shape, device="cuda", dtype=DTYPE) for _ in range(2))
        self.q = torch.randn(rows * queries, heads.q_heads, heads.head_dim, device="cuda", dtype=DTYPE)
        self.table = (torch.randperm(rows * pages, device="cuda") + 1).view(rows, pages).int()
        self.lengths = torch.full((rows,), context, dtype=torch.int32, device="cuda")
        starts = list(range(0, rows * queries + 1, queries))
        nothing = torch.zeros(rows * queries, dtype=torch.int64, device="cuda")
        self.batch = ForwardBatch(
            token_ids=nothing,
            positions=nothing,
            slots=nothing,
            query_starts=starts,
            context_lens=self.lengths,
            max_context=context,
            block_tables=None,
            num_decode=rows if queries == 1 else 0,
            sample_index=None,
            rows=torch.arange(rows, dtype=torch.int32, device="cuda"),
            table=self.table,
            query_starts_device=torch.tensor(starts, dtype=torch.int32, device="cuda"),
            max_query_len=queries,
        )


class TensorCoreDecode:
    """FlashInfer's FA2 kernel for one query per row; the table is used as it is, with rows of equal length."""

    def __init__(self, heads: Heads, scale: float) -> None:
        self._heads, self._scale = heads, scale
        self._module = load_module("fa2", heads.head_dim)
        self._parts = torch.empty(_WORKSPACE, dtype=torch.uint8, device="cuda")
        self._ints = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
        self._pinned = torch.empty(8 << 20, dtype=torch.uint8, pin_memory=True)

    def plan(self, case: Case, block_size: int, context: int) -> object:
        rows, pages = case.table.shape
        starts = torch.arange(rows + 1, dtype=torch.int32)
        self._pages = (torch.arange(rows + 1, dtype=torch.int32) * pages).cuda()
        self._starts = starts.cuda()
        self._last = case.lengths - (pages - 1) * block_size
        heads, lengths = self._heads, torch.full((rows,), context, dtype=torch.int32)
        sizes = (rows, rows, heads.q_heads, heads.kv_heads, block_size, False, heads.head_dim, heads.head_dim)
        memory = (self._parts, self._ints, self._pinned)
        return self._module.plan(*memory, starts, self._pages.cpu(), lengths, *sizes, False, -1, -1, False, 0, 0)

    def run(self, case: Case, work: object) -> Tensor:
        """`plan` has seen another case of the same sizes."""
        out = torch.empty_like(case.q)
        tables = (self._starts, self._pages, case.table, self._last)
        nothing = (None,) * 8
        self._module.paged_run(
            self._parts, self._ints, work, case.q, case.k, case.v, *tables, out, None, 0, 1, -1, False,
            *nothing, 0.0, self._scale, 1.0, 1e-4, 0,
        )  # fmt: skip
        return out


def milliseconds(action: Callable[[], object], repeats: int = 15) -> float:
    sweep = torch.empty(_SWEEP, dtype=torch.uint8, device="cuda")
    times = []
    for turn in range(repeats + 3):
        sweep.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def in_graph(calls: list[Callable[[], object]], least: int = 32) -> float:
    """Microseconds of one of `calls`, which run after one another as they would in the layers of a step."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    rounds = -(-least // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:]) * 1e3 / (rounds * len(calls))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def prefill(heads: Heads, block_size: int, queries: int, prefix: int) -> dict[str, object]:
    scale, device = heads.head_dim**-0.5, torch.device("cuda")
    case = Case(heads, block_size, 1, queries + prefix, queries)
    flop = 4 * heads.q_heads * heads.head_dim * queries * (prefix + queries / 2)
    triton = TritonAttention(scale, None)
    plan = triton.plan(case.batch, block_size, DTYPE)
    expected = triton.attend(case.q, case.k, case.v, plan)
    took = milliseconds(lambda: triton.attend(case.q, case.k, case.v, plan))
    result: dict[str, object] = {"prefill": queries, "prefix": prefix, "triton_ms": round(took, 3)}
    result["triton_tflop_s"] = round(flop / took / 1e9, 1)
    if flashinfer_serves(device, DTYPE, DTYPE, heads.head_dim, None):
        other = flashinfer_attention(triton, heads, device, dtype=DTYPE, kv_dtype=DTYPE, scale=scale, window=None)
        began = time.perf_counter()
        work = other.plan(case.batch, block_size, DTYPE)
        result["fa3_plan_host_ms"] = round((time.perf_counter() - began) * 1e3, 3)
        took = milliseconds(lambda: other.attend(case.q, case.k, case.v, work))
        result["fa3_ms"] = round(took, 3)
        result["fa3_tflop_s"] = round(flop / took / 1e9, 1)
        result["error"] = error(other.attend(case.q, case.k, case.v, work), expected)
    return result


def cases_of(heads: Heads, block_size: int, rows: int, context: int) -> tuple[list[Case], int]:
    """Enough of them to exceed the L2 cache, and the bytes that each reads."""
    moved = 2 * 2 * rows * context * heads.kv_heads * heads.head_dim
    count = max(1, min(32, -(-_ROTATE // moved)))
    return [Case(heads, block_size, rows, context, 1) for _ in range(count)], moved


def decode(heads: Heads, block_size: int, rows: int, context: int) -> dict[str, object]:
    scale = heads.head_dim**-0.5
    cases, moved = cases_of(heads, block_size, rows, context)
    triton = TritonAttention(scale, None)
    triton.prepare(heads.q_heads, heads.head_dim, torch.device("cuda"))
    plan = triton.plan(cases[0].batch, block_size, DTYPE)
    expected = triton.attend(cases[0].q, cases[0].k, cases[0].v, plan)
    for case in cases:
        case.batch.max_context = max(context, MAX_MODEL_LEN)
    plans = [triton.plan(case.batch, block_size, DTYPE) for case in cases]
    pairs = list(zip(cases, plans, strict=True))
    took = in_graph([lambda c=c, p=p: triton.attend(c.q, c.k, c.v, p) for c, p in pairs])
    result: dict[str, object] = {"decode": rows, "context": context, "triton_us": round(took, 1)}
    result["triton_gb_s"] = round(moved / took / 1e3)
    if prebuilt("fa2", heads.head_dim) is not None:
        other = TensorCoreDecode(heads, scale)
        other.plan(cases[0], block_size, context)
        torch.cuda.synchronize()
        began = time.perf_counter()
        work = other.plan(cases[0], block_size, context)
        result["fa2_plan_host_ms"] = round((time.perf_counter() - began) * 1e3, 3)
        torch.cuda.synchronize()
        took = in_graph([lambda c=c: other.run(c, work) for c in cases])
        result["fa2_us"] = round(took, 1)
        result["fa2_gb_s"] = round(moved / took / 1e3)
        result["error"] = error(other.run(cases[0], work).flatten(1), expected)
    return result


def variants(heads: Heads, block_size: int) -> Iterator[dict[str, object]]:
    """Every configuration, split as in a captured graph, for each number of rows and length."""
    device, scale = torch.device("cuda"), heads.head_dim**-0.5
    workspace = decode_workspace(max(ROWS), heads.q_heads, heads.head_dim, 64, device)
    sms = sm_count(device)

    @torch.inference_mode()
    def call(case: Case, config: DecodeConfig) -> Tensor:
        rows = len(case.q)
        out = case.q.new_empty(rows, heads.q_heads * heads.head_dim)
        splits = choose_splits(rows, heads.kv_heads, MAX_MODEL_LEN, sms, config.programs)
        paged_decode(
            case.q, case.k, case.v, case.table, case.batch.rows, case.lengths, out,
            scale=scale, window=None, num_splits=splits, workspace=workspace, config=config,
        )  # fmt: skip
        return out

    small = Case(heads, block_size, 1, 300, 1)
    with ThreadPoolExecutor(12) as pool:  # compiles
        list(pool.map(lambda config: call(small, config), CONFIGS))
    torch.cuda.synchronize()
    for rows, context in product(ROWS, CONTEXTS):
        cases, moved = cases_of(heads, block_size, rows, context)
        taken = decode_config(heads.head_dim, DTYPE, rows * heads.kv_heads, sms)
        times: dict[DecodeConfig, float] = {}
        expected, worst = call(cases[0], taken), 0.0
        for config in {taken: None} | dict.fromkeys(CONFIGS):
            least = 32 if moved < 1 << 28 else 4
            times[config] = in_graph([lambda c=c: call(c, config) for c in cases], least)  # noqa: B023
            worst = max(worst, error(call(cases[0], config), expected))
        order = sorted(times, key=lambda config: times[config])
        best = order[0]
        line = (
            f"{heads.q_heads}/{heads.kv_heads} heads, {rows:3} x {context:4}: {times[taken]:6.1f} us with {show(taken)}"
        )
        line += f", best {times[best]:6.1f} us with {show(best)}, {moved / times[best] / 1e3:.0f} GB/s"
        print(line, file=sys.stderr)
        about = {"variants": rows, "context": context, "taken": show(taken), "worst_error": worst}
        yield about | {"us": {show(config): round(times[config], 2) for config in order}}


def show(config: DecodeConfig) -> str:
    """As one writes it in the table."""
    return f"({config.keys}, {config.warps}, {config.stages}, {config.fused}, {config.programs})"


def linears() -> Iterator[dict[str, object]]:
    for (width, depth), rows in product(LINEARS, (1, 2, 8, 32, 64)):
        count = max(1, min(32, -(-_ROTATE // (2 * width * depth))))
        weights = list(torch.randn(count, width, depth, device="cuda", dtype=DTYPE).unbind(0))
        x = torch.randn(rows, depth, device="cuda", dtype=DTYPE)
        took = in_graph([lambda w=w: F.linear(x, w) for w in weights])  # noqa: B023
        gb_s = round(2 * width * depth / took / 1e3)
        yield {"linear": [width, depth], "rows": rows, "us": round(took, 2), "gb_s": gb_s}


def everything(only: list[str], heads: list[Heads], block_size: int) -> Iterator[dict[str, object]]:
    for shape in heads:
        about: dict[str, object] = {"heads": str(shape), "block_size": block_size}
        if "prefill" in only:
            yield from (prefill(shape, block_size, *size) | about for size in PREFILLS)
        if "decode" in only:
            yield from (decode(shape, block_size, *size) | about for size in DECODES)
        if "variants" in only:
            yield from (line | about for line in variants(shape, block_size))
    if "linears" in only:
        yield from linears()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = [Heads(32, 8, 128), Heads(16, 8, 128)]
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=["prefill", "decode", "variants", "linears"]
    )
    parser.add_argument("--heads", type=lambda text: Heads(*map(int, text.split(","))), nargs="+", default=shapes)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with torch.inference_mode():
        for result in everything(options.only, options.heads, options.block_size):
            line = json.dumps(result)
            print(line, flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
