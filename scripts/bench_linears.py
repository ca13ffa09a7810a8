"""Products of few rows on one GPU: our kernels in many tiles beside cuBLAS with what stands around it.

    python scripts/bench_linears.py [--models 8b,0.6b,8b/2] [--rows 1,4,8,16,32] [--json FILE]
    python scripts/bench_linears.py --report FILE     # the tables once more, also of a run that was cut short

The products of a decoder layer, and the head, of Llama 3.1 8B, of half of it (a rank of two), and of Qwen3 0.6B, in
bfloat16. A time is that of one call in a replayed graph of many, over weights that are all distinct and together exceed
the L2 cache; the median of several replays. `share` is the time that a copy of as many bytes as the weights takes, over
the time.

  cublas    the product alone, as torch calls it
  today     with what our kernels do in the same launch: the sum with the residual and its norm before it (or after it),
            silu(gate) * up after it, each a launch of its own
  ours      everything in one launch, in each tile

One JSON object per line, appended to FILE too. What comes last are lines for `engine/kernels/linear_table.py`: for each
shape, the fastest tile where it is faster than `today`, and None where it is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_kernels import Floor, in_graph
from torch import Tensor
from triton.runtime.errors import OutOfResources

from treadle.engine.kernels.elementwise import add_rms_norm, silu_mul
from treadle.engine.kernels.linear import linear
from treadle.engine.kernels.linear_table import LinearConfig, choose

DTYPE = torch.bfloat16
ROTATE_BYTES = 256 << 20
THREADS = 12
Report = dict[str, Any]
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """outputs: of a row, half of the weight's rows where gated. norm, add: what the model does before and after it."""

    name: str
    outputs: int
    inner: int
    norm: bool = False
    gated: bool = False
    add: bool = False

    @property
    def weight_rows(self) -> int:
        return 2 * self.outputs if self.gated else self.outputs


MODELS = {
    "8b": [
        Shape("qkv", 6144, 4096, norm=True),
        Shape("o", 4096, 4096, add=True),
        Shape("gate_up", 14336, 4096, norm=True, gated=True),
        Shape("down", 4096, 14336, add=True),
        Shape("head", 128256, 4096),
    ],
    "0.6b": [
        Shape("qkv", 4096, 1024, norm=True),
        Shape("o", 1024, 2048, add=True),
        Shape("gate_up", 3072, 1024, norm=True, gated=True),
        Shape("down", 1024, 3072, add=True),
        Shape("head", 151936, 1024),
    ],
    "8b/2": [
        Shape("qkv", 3072, 4096),
        Shape("o", 4096, 2048),
        Shape("gate_up", 7168, 4096, gated=True),
        Shape("down", 4096, 7168),
        Shape("head", 64128, 4096),
    ],
}

# columns, depth, warps, stages
VECTOR = [
    (2, 1024, 2, 4), (2, 2048, 4, 3), (4, 512, 2, 5), (4, 1024, 4, 1), (4, 1024, 4, 3), (4, 1024, 4, 5), (8, 512, 4, 1),
    (8, 512, 4, 4), (8, 512, 4, 6), (8, 1024, 8, 3), (16, 256, 4, 4), (16, 512, 8, 4), (16, 256, 4, 7),
]  # fmt: skip
MATRIX = [
    (16, 128, 1, 6), (16, 256, 1, 4), (16, 256, 1, 7), (16, 256, 2, 5), (16, 256, 4, 7), (16, 512, 4, 4),
    (32, 128, 2, 4), (32, 128, 2, 7), (32, 256, 2, 4), (32, 256, 4, 4), (32, 256, 4, 6), (64, 64, 4, 6),
    (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (128, 64, 4, 5), (128, 128, 4, 3),
]  # fmt: skip


class Case:
    """One product with as many weights as it takes to leave the L2 cache nothing to keep."""

    def __init__(self, shape: Shape, rows: int) -> None:
        count = max(2, -(-ROTATE_BYTES // (shape.weight_rows * shape.inner * 2)))
        self.shape, self.rows = shape, rows
        self.x = torch.randn(rows, shape.inner, device="cuda", dtype=DTYPE)
        self.weights = [
            torch.randn(shape.weight_rows, shape.inner, device="cuda", dtype=DTYPE) * shape.inner**-0.5
            for _ in range(count)
        ]
        self.norm = torch.rand(shape.inner, device="cuda", dtype=DTYPE)
        self.after = torch.rand(shape.outputs, device="cuda", dtype=DTYPE)
        self.out = torch.zeros(rows, shape.outputs, device="cuda", dtype=DTYPE)
        self.residual = torch.zeros_like(self.x)

    def cublas(self, weight: Tensor) -> Tensor:
        return F.linear(self.x, weight)

    def today(self, weight: Tensor) -> Tensor:
        """In a layer, one of the two norms stands before the product with a norm, the other before the gated one."""
        x = add_rms_norm(self.x, self.residual, self.norm, 1e-5) if self.shape.norm else self.x
        y = F.linear(x, weight)
        return silu_mul(y) if self.shape.gated else y

    def ours(self, config: LinearConfig, weight: Tensor) -> Tensor:
        shape = self.shape
        norm = self.norm if shape.norm else None
        return linear(
            self.x, weight, self.out, config, norm=norm, eps=1e-5, gated=shape.gated, add=shape.add
        )  # fmt: skip

    def candidates(self) -> list[LinearConfig]:
        if self.rows == 1:
            found = [LinearConfig(1, *tile) for tile in VECTOR]
        else:
            lanes = 8 if self.rows <= 8 else 16 if self.rows <= 16 else 32
            found = [LinearConfig(lanes, *tile) for tile in MATRIX]
        taken = choose((9, 0), self.rows, self.shape.outputs, self.shape.inner, self.shape.gated)
        return list(dict.fromkeys([*([taken] if taken else []), *found]))

    def compiled(self, configs: list[LinearConfig]) -> list[LinearConfig]:
        """Those that fit into a multiprocessor."""
        stream = torch.cuda.current_stream()

        def one(config: LinearConfig) -> bool:
            try:
                with torch.inference_mode(), torch.cuda.stream(stream):
                    self.ours(config, self.weights[0])
                    return True
            except OutOfResources:
                return False

        with ThreadPoolExecutor(THREADS) as pool:
            return [config for config, fits in zip(configs, pool.map(one, configs), strict=True) if fits]

    def wrong(self, config: LinearConfig) -> float:
        """Relative error against float64."""
        shape, weight = self.shape, self.weights[0]
        self.out.zero_()
        self.x.copy_(torch.randn_like(self.x))
        x = self.x.double()
        if shape.norm:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.norm.double()
        exact = x @ weight.double().T
        if shape.gated:
            gate, up = exact.chunk(2, -1)
            exact = F.silu(gate) * up
        found = self.ours(config, weight).double()
        return float((found - exact).norm() / exact.norm())


def measure(case: Case, call: Callable[[Tensor], Tensor]) -> float:
    return in_graph([partial(call, weight) for weight in case.weights])


def case_reports(floor: Floor, model: str, shape: Shape, rows: int) -> Iterator[Report]:
    case = Case(shape, rows)
    about = {"model": model, "shape": shape.name, "rows": rows, "outputs": shape.outputs, "inner": shape.inner}
    about |= {"gated": shape.gated}
    moved = shape.weight_rows * shape.inner * 2

    def report(kind: str, us: float) -> Report:
        return about | {"kind": kind} | floor.judge(us, moved)

    yield report("cublas", measure(case, case.cublas))
    yield report("today", measure(case, case.today))
    timed: list[tuple[float, LinearConfig]] = []
    for config in case.compiled(case.candidates()):
        timed.append((measure(case, partial(case.ours, config)), config))
    for us, config in timed:
        yield report("ours", us) | {"config": asdict(config)}
    fastest = min(timed, key=lambda pair: pair[0])[1]
    if shape.weight_rows < 1 << 16:
        yield about | {"kind": "error", "error": case.wrong(fastest), "config": asdict(fastest)}


def summary(reports: list[Report]) -> str:
    """For people: one line for each case; for the table: its entries."""
    groups: dict[tuple[Any, ...], list[Report]] = {}
    for one in reports:
        if "us" in one:
            key = (one["model"], one["shape"], one["rows"], one["outputs"], one["inner"], one["gated"])
            groups.setdefault(key, []).append(one)
    lines = ["| product | rows | cublas | today | ours | share | |", "|---|---|---|---|---|---|---|"]
    table: dict[tuple[int, int, bool], list[str]] = {}
    for (model, name, rows, outputs, inner, gated), found in groups.items():
        by_kind = {one["kind"]: one for one in found if one["kind"] != "ours"}
        best = min((one for one in found if one["kind"] == "ours"), key=lambda one: float(one["us"]))
        tile = ", ".join(str(best["config"][name]) for name in ("rows", "columns", "depth", "warps", "stages"))
        lines.append(
            f"| {model} {name} {outputs} x {inner} | {rows} | {by_kind['cublas']['us']} | {by_kind['today']['us']} "
            f"| {best['us']} | {best['share']:.0%} | {tile} |"
        )
        chosen = f"LinearConfig({tile})" if best["us"] < by_kind["today"]["us"] else "None"
        table.setdefault((outputs, inner, gated), []).append(f"({rows}, {chosen})")
    entries = [f"    {key}: ({', '.join(parts)},)," for key, parts in table.items()]
    return "\n".join([*lines, "", "_MEASURED = {", *entries, "}"])


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--report", type=Path, metavar="FILE")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["8b", "0.6b"])
    parser.add_argument("--rows", type=numbers, default=[1, 4, 8, 16, 32])
    options = parser.parse_args()
    if options.report is not None:
        print(summary([json.loads(line) for line in options.report.read_text().splitlines()]))
        return 0
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; there are {', '.join(MODELS)}")
    if not torch.cuda.is_available():
        parser.error("needs a GPU")

    floor = Floor()
    reports: list[Report] = [floor.report()]
    print(json.dumps(reports[0]), flush=True)
    with torch.inference_mode():
        for model in options.models:
            for shape in MODELS[model]:
                for rows in options.rows:
                    found = list(case_reports(floor, model, shape, rows))
                    reports += found
                    torch.cuda.empty_cache()
                    print(summary(found).splitlines()[2], flush=True)
                    if options.json is not None:
                        with options.json.open("a") as file:
                            file.writelines(json.dumps(one) + "\n" for one in found)
    print(summary(reports))
    return 0


if __name__ == "__main__":
    sys.exit(main())
