"""Attention kernels on one GPU: our Triton kernels against FlashInfer's, prefill and decode.

    python scripts/bench_attention.py [--heads 32,8,128] [--block-size 16] [--json FILE]

Random bfloat16 numbers in scattered pages; medians of single calls, each after the L2 cache was swept. Prefill in
TFLOP/s of the causal half; decode in GB/s of the keys and values that must be read. FlashInfer's decode is its
tensor-core kernel; its plan, made once per step on the host, is timed apart. Errors are against Triton's result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from treadle.engine.batch import ForwardBatch
from treadle.engine.flashinfer import flashinfer_attention, flashinfer_serves
from treadle.engine.flashinfer.backend import Heads
from treadle.engine.flashinfer.modules import load_module, prebuilt
from treadle.engine.kernels.paged_attention import TritonAttention

DTYPE = torch.bfloat16
PREFILLS = [(512, 0), (2048, 0), (8192, 0), (16384, 16384)]
DECODES = [(1, 1088), (8, 1088), (32, 1088), (64, 1088), (128, 1088), (256, 1088), (1, 32768), (16, 8192)]
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


def decode(heads: Heads, block_size: int, rows: int, context: int) -> dict[str, object]:
    scale = heads.head_dim**-0.5
    case = Case(heads, block_size, rows, context, 1)
    moved = 2 * 2 * rows * context * heads.kv_heads * heads.head_dim
    triton = TritonAttention(scale, None)
    triton.prepare(heads.q_heads, heads.head_dim, torch.device("cuda"))
    plan = triton.plan(case.batch, block_size, DTYPE)
    expected = triton.attend(case.q, case.k, case.v, plan)
    took = milliseconds(lambda: triton.attend(case.q, case.k, case.v, plan))
    result: dict[str, object] = {"decode": rows, "context": context, "triton_us": round(took * 1e3, 1)}
    result["triton_gb_s"] = round(moved / took / 1e6)
    if prebuilt("fa2", heads.head_dim) is not None:
        other = TensorCoreDecode(heads, scale)
        other.plan(case, block_size, context)
        torch.cuda.synchronize()
        began = time.perf_counter()
        work = other.plan(case, block_size, context)
        result["fa2_plan_host_ms"] = round((time.perf_counter() - began) * 1e3, 3)
        torch.cuda.synchronize()
        took = milliseconds(lambda: other.run(case, work))
        result["fa2_us"] = round(took * 1e3, 1)
        result["fa2_gb_s"] = round(moved / took / 1e6)
        result["error"] = error(other.run(case, work).flatten(1), expected)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=lambda text: Heads(*map(int, text.split(","))), default=Heads(32, 8, 128))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with torch.inference_mode():
        cases = [lambda args=args: prefill(options.heads, options.block_size, *args) for args in PREFILLS]
        cases += [lambda args=args: decode(options.heads, options.block_size, *args) for args in DECODES]
        for case in cases:
            line = json.dumps(case() | {"heads": str(options.heads), "block_size": options.block_size})
            print(line, flush=True)
            if options.json is not None:
                with options.json.open("a") as file:
                    file.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
