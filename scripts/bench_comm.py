"""Collectives between the GPUs of one machine: NCCL against symmetric memory, and what they cost a decode step.

    python scripts/bench_comm.py [--world-size 2] [--json FILE] [--steps OURS.jsonl --model-config llama-3.1-8b]
        [--only all_reduce]

All-reduce, all-gather and broadcast of bfloat16 from 1 KB to 64 MB (for all-gather: each rank's part), each captured
`--calls` times in a CUDA graph, as the engine captures them: microseconds per call, the slowest rank's median over
replays. Every kind is checked before it is timed.

  nccl          as torch.distributed calls it
  symmetric     a copy, then every GPU reads its peers' parts and adds them up (`SymmetricComm.all_reduce`)
  staged        the same without the copy: the product before it wrote where the peers read
  fused copy    torch's kernel that copies first itself. Timed only: its source does not wait for a block's own copies
  two shot      each GPU adds up its share, then all collect (`two_shot_all_reduce_out`; 2, 4 or 8 GPUs)
  in place      each GPU adds up its share and writes it to all, where the parts were (`SymmetricComm.reduce_staged`)

The second table is what all the sums of a step take together (two per layer and one for the embedding, N tokens each),
as a share of the measured step (--steps: the output of bench_gpu.py for this world size). Its last two kinds are what a
layer does with a sum: "staged, norm" adds it to the residual and takes the norm in a second launch, as "nccl, norm"
does after NCCL; "fused" does all of it in one (`comm_fused.SymmetricSums`), in two slots by turns. Multicast stays off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
os.environ.setdefault("NCCL_NVLS_ENABLE", "0")

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from treadle.engine.comm import Communicator, make_comm
from treadle.engine.comm_fused import SymmetricSums, make_sums
from treadle.engine.comm_symm import SymmetricBuffer, SymmetricComm
from treadle.engine.kernels.elementwise import add_rms_norm

SIZES = [1 << shift for shift in range(10, 27)]
LARGEST_ONE_SHOT = 8 << 20
LARGEST_TWO_SHOT = SIZES[-1]
COLLECTIVES = ("all_reduce", "all_gather", "broadcast")
MODELS = Path(__file__).parent / "models"
Action = Callable[[], object]


class Rank:
    """One process: the same calls on every rank, in the same order."""

    def __init__(self, rank: int, world_size: int, init_method: str, options: argparse.Namespace) -> None:
        self.device = torch.device("cuda", rank)
        torch.cuda.set_device(self.device)
        self.nccl: Communicator = make_comm(
            rank, world_size, self.device, init_method=init_method, shared_dir=Path("."), symmetric=False
        )
        self.group = dist.group.WORLD.group_name
        self.memory = SymmetricBuffer(LARGEST_TWO_SHOT + LARGEST_ONE_SHOT * world_size, self.device, self.group)
        self.fast = SymmetricComm(self.nccl, self.memory, LARGEST_ONE_SHOT, LARGEST_TWO_SHOT)
        self.sums: SymmetricSums | None = make_sums(self.nccl, self.device, LARGEST_ONE_SHOT)
        self.options = options
        self.stream = torch.cuda.Stream()

    def all_reduce(self, size: int) -> dict[str, Action]:
        x = self.numbers(size)
        kinds: dict[str, Action] = {"nccl": lambda: self.nccl.all_reduce(x)}
        ops, memory = torch.ops.symm_mem, self.memory.buffer
        staged, out = self.fast.staging(tuple(x.shape), x.dtype), torch.empty_like(x)
        assert staged is not None and memory.data_ptr() == staged.data_ptr()
        kinds["in place"] = lambda: self.memory.reduce_in_place(staged)
        if size > LARGEST_ONE_SHOT:
            return kinds
        kinds["symmetric"] = lambda: self.fast.all_reduce(x)
        kinds["staged"] = lambda: self.memory.reduce(staged, out)
        kinds["fused copy"] = lambda: ops.one_shot_all_reduce_copy_out(staged, x, "sum", self.group, out)
        if self.nccl.world_size in (2, 4, 8):
            kinds["two shot"] = lambda: ops.two_shot_all_reduce_out(staged, "sum", self.group, out)
        return kinds

    def all_gather(self, size: int) -> dict[str, Action]:
        x = self.numbers(size)
        kinds: dict[str, Action] = {"nccl": lambda: self.nccl.all_gather(x)}
        if size <= LARGEST_ONE_SHOT:
            kinds["symmetric"] = lambda: self.fast.all_gather(x)
        return kinds

    def broadcast(self, size: int) -> dict[str, Action]:
        x = self.numbers(size)
        return {"nccl": lambda: dist.broadcast(x, 0)}

    def numbers(self, size: int) -> Tensor:
        """Small whole numbers, whose sums are exact."""
        generator = torch.Generator(self.device).manual_seed(size + self.nccl.rank)
        return torch.randint(-8, 9, (size // 2,), generator=generator, device=self.device).to(torch.bfloat16)

    def with_norm(self, tokens: int, hidden: int) -> dict[str, Action]:
        """A layer's two sums, each with the residual and the norm behind it."""
        size = tokens * hidden * 2
        plain = self.all_reduce(size)
        residual, weight = (torch.zeros(*shape, hidden, device=self.device) for shape in ((tokens,), ()))
        stream, norm = residual.bfloat16(), weight.bfloat16()
        x = stream.clone()

        def apart(kind: str) -> Action:
            def twice() -> None:
                for _ in range(2):
                    plain[kind]()
                    add_rms_norm(x, stream, norm, 1e-5)

            return twice

        kinds = {f"{kind}, norm": apart(kind) for kind in ("nccl", "staged", "in place") if kind in plain}
        sums = self.sums
        parts = [] if sums is None else [sums.slot(turn, (tokens, hidden), torch.bfloat16) for turn in (0, 1)]
        if sums is not None and all(part is not None for part in parts):

            def fused() -> None:
                for part in parts:
                    assert part is not None
                    sums.add_norm(part, stream, norm, 1e-5)

            for part in parts:
                assert part is not None
                part.zero_()
            kinds["fused"] = fused
        return kinds

    def check_fused(self) -> None:
        """Against NCCL's sums, in turns; a race would show now and then."""
        if self.sums is None:
            print("no fused sums here")
            return
        norm = torch.ones(4096, device=self.device, dtype=torch.bfloat16)
        for turn in range(400):
            tokens = (1, 2, 7, 32, 64)[turn // 2 % 5]
            part = self.sums.slot(turn, (tokens, 4096), torch.bfloat16)
            assert part is not None
            x = torch.randint(-8, 9, (tokens, 4096), device=self.device).to(torch.bfloat16)
            part.copy_(x)
            residual = torch.zeros_like(x)
            self.sums.add_norm(part, residual, norm, 1e-5)
            if turn % 10 < 8:  # not always: NCCL would keep the ranks together
                continue
            if not torch.equal(residual, self.nccl.all_reduce(x.clone())):
                raise SystemExit(f"fused sums of {tokens} tokens are wrong, turn {turn}")

    def check(self) -> None:
        self.check_fused()
        for size in SIZES:
            x = self.numbers(size)
            expected = self.nccl.all_reduce(x.clone())
            staged = self.fast.staging(tuple(x.shape), x.dtype)
            assert staged is not None
            for _ in range(20):
                staged.copy_(x)
                self.memory.reduce_in_place(staged)
                if not torch.equal(staged, expected):
                    raise SystemExit(f"sums in place of {size} bytes are wrong")
        for size in (1 << 10, 1 << 16, LARGEST_ONE_SHOT):
            x = self.numbers(size)
            expected = self.nccl.all_reduce(x.clone())
            staged = self.fast.staging(tuple(x.shape), x.dtype)
            assert staged is not None
            for _ in range(20):  # a race would show now and then
                if not torch.equal(self.fast.all_reduce(x.clone()), expected):
                    raise SystemExit(f"symmetric sums of {size} bytes are wrong")
                staged.copy_(x)
                if not torch.equal(self.fast.all_reduce(staged), expected):
                    raise SystemExit(f"staged sums of {size} bytes are wrong")
            if not torch.equal(self.fast.all_gather(x), self.nccl.all_gather(x)):
                raise SystemExit(f"symmetric gathers of {size} bytes are wrong")

    def microseconds(self, action: Action, size: int) -> float:
        """Per call, captured; the slowest rank's."""
        calls = max(4, min(self.options.calls, (64 << 20) // size))
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                action()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                for _ in range(calls):
                    action()
            times = []
            for _ in range(self.options.repeats + 3):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e3 / calls)
            mine = torch.tensor([statistics.median(times[3:])], device=self.device)
            slowest = float(self.nccl.all_gather(mine).max())
        self.stream.synchronize()
        return slowest

    def run(self) -> list[dict[str, Any]]:
        self.check()
        found = []
        for name in self.options.only:
            for size in SIZES:
                for kind, action in getattr(self, name)(size).items():
                    found.append(
                        {"collective": name, "bytes": size, "kind": kind, "us": self.microseconds(action, size)}
                    )
        return found + self.steps()

    def steps(self) -> list[dict[str, Any]]:
        """The sums of a step of N tokens, in a graph as the step has them, without what lies between."""
        options = self.options
        if options.model_config is None:
            return []
        config = json.loads((model_directory(options.model_config) / "config.json").read_text())
        number, found = 2 * config["num_hidden_layers"] + 1, []
        for tokens in options.batch_sizes:
            size = tokens * config["hidden_size"] * 2
            kinds = self.all_reduce(size)
            for kind in ("nccl", "symmetric", "staged", "in place"):
                if kind in kinds:
                    us = self.microseconds(kinds[kind], size) * number
                    found.append({"step": tokens, "bytes": size, "sums": number, "kind": kind, "us": us})
            for kind, action in self.with_norm(tokens, config["hidden_size"]).items():
                us = self.microseconds(action, size) / 2 * number
                found.append({"step": tokens, "bytes": size, "sums": number, "kind": kind, "us": us})
        return found


def model_directory(name: str) -> Path:
    return Path(name) if Path(name).is_dir() else MODELS / name


def work(rank: int, world_size: int, init_method: str, options: argparse.Namespace) -> None:
    with torch.inference_mode():
        found = Rank(rank, world_size, init_method, options).run()
    if rank == 0:
        report(found, options, world_size)
    dist.barrier()
    dist.destroy_process_group()


def report(found: list[dict[str, Any]], options: argparse.Namespace, world_size: int) -> None:
    name = torch.cuda.get_device_name()
    if options.json is not None:
        options.json.write_text("".join(json.dumps(entry | {"gpus": world_size}) + "\n" for entry in found))
    print(f"{world_size} x {name}, microseconds per call in a CUDA graph\n")
    for collective in options.only:
        entries = [entry for entry in found if entry.get("collective") == collective]
        kinds = list(dict.fromkeys(entry["kind"] for entry in entries))
        print(f"| {collective} | " + " | ".join(kinds) + " | GB/s of the fastest |\n" + "|---" * (len(kinds) + 2) + "|")
        for size in SIZES:
            row = {entry["kind"]: entry["us"] for entry in entries if entry["bytes"] == size}
            cells = [f"{row[kind]:.1f}" if kind in row else "" for kind in kinds]
            print(f"| {size >> 10} KB | " + " | ".join(cells) + f" | {size / min(row.values()) / 1e3:.1f} |")
        print()
    steps = measured_steps(options.steps, world_size)
    rows = [entry for entry in found if "step" in entry]
    if rows:
        print("| tokens | bytes | kind | sums of a step, us | share of the step |\n|---|---|---|---|---|")
    for entry in rows:
        step = steps.get(entry["step"])
        share = "" if step is None else f"{entry['us'] / 1e3 / step:.1%}"
        print(f"| {entry['step']} | {entry['bytes']} | {entry['kind']} | {entry['us']:.0f} | {share} |")


def measured_steps(path: Path | None, world_size: int) -> dict[int, float]:
    """Milliseconds by number of rows."""
    if path is None or not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["batch"]: r["step_ms_median"] for r in records if r.get("step_ms_median") and r["tp"] == world_size}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-size", type=int, default=0, help="0: all GPUs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model-config", default=None)
    parser.add_argument(
        "--batch-sizes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32, 64, 256]
    )
    parser.add_argument("--only", choices=COLLECTIVES, nargs="+", default=COLLECTIVES)
    parser.add_argument("--steps", type=Path, metavar="FILE")
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    world_size = options.world_size or torch.cuda.device_count()
    if world_size < 2:
        raise SystemExit(f"collectives need two GPUs, here are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as directory:
        init_method = f"file://{directory}/rendezvous"
        multiprocessing.start_processes(work, (world_size, init_method, options), world_size, start_method="spawn")
    return 0


if __name__ == "__main__":
    sys.exit(main())
