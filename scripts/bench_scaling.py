"""What more GPUs bring: one model on 1, 2, 3 and 4 of them, measured beside what the cost model predicts.

    python scripts/bench_scaling.py --json OUT.jsonl --comm COMM.jsonl [--models llama-3.1-8b,llama-3.3-70b-half]
        [--sizes 1,2,3,4] [--dataset sharegpt_lens.jsonl] [--plot OUT.svg]
        [--jobs llama-3.1-8b:1,llama-3.1-8b:4,vllm:llama-3.1-8b:4 --vllm-bench bench_vllm_offline.py --vllm-env env.sh]
    python scripts/bench_scaling.py --from OUT.jsonl --comm COMM.jsonl [--plot OUT.svg]      tables of an earlier run

THE WEIGHTS ARE RANDOM. llama-3.3-70b-half is 70B's layers, 40 instead of 80, so that one GPU of 141 GB holds them.
Runs scripts/bench_gpu.py for every model and size (decode steps, time to first token; throughput where there is a
dataset), groups beside each other on the machine's GPUs unless --one-at-a-time, then scripts/bench_comm.py for every
size alone: the time of an all-reduce from 1 KB to 64 MB. The tables have speed-up, efficiency, the share of the sums,
and the step that scripts/scaling_model.py predicts from one GPU's step and those times.

Whenever GPUs become free, the first job that fits begins. --jobs names them in another order, so that no GPU waits
long, and some of vLLM: its results go to vllm.jsonl beside --json, and the tables have the ratio of ours to it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_gpu import Limits, Record, medians, read, shape_of
from scaling_model import Model, Sums, predict

from treadle.engine.comm_symm import ONE_SHOT_BYTES
from treadle.engine.config import load_config

HERE = Path(__file__).parent
MODELS = HERE / "models"


@dataclass(frozen=True, slots=True)
class Job:
    """peer: vLLM's, not ours."""

    model: str
    size: int
    peer: bool = False


class Gpus:
    """Who has which GPU, by the names that CUDA_VISIBLE_DEVICES knows. Jobs wait until enough are free."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._free = list(names)
        self._changed = asyncio.Condition()

    async def take(self, count: int) -> list[str]:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._free) >= count)
            taken, self._free = self._free[:count], self._free[count:]
            return taken

    async def give(self, taken: list[str]) -> None:
        async with self._changed:
            self._free = [name for name in self.names if name in self._free or name in taken]
            self._changed.notify_all()


async def call(arguments: Sequence[str], log: Path, gpus: Sequence[str] | None = None) -> None:
    environment = dict(os.environ)
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=output, stderr=output)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
    if code:
        print(f"{' '.join(arguments)}: exit code {code}, see {log}", file=sys.stderr)


async def measure(options: argparse.Namespace, gpus: Gpus) -> None:
    jobs = options.jobs or [Job(model, size) for model in options.models for size in options.sizes]
    jobs = [job for job in jobs if job.size <= len(gpus.names)]
    await call([sys.executable, str(HERE / "gpu_limits.py"), "--json", str(options.limits)], options.log)
    if options.one_at_a_time:
        for job in jobs:
            await bench(job, options, gpus.names[: job.size])
        return

    async def wait_and_bench(job: Job) -> None:
        taken = await gpus.take(job.size)
        try:
            await bench(job, options, taken)
        finally:
            await gpus.give(taken)

    async with asyncio.TaskGroup() as group:
        for job in jobs:
            group.create_task(wait_and_bench(job))


async def bench(job: Job, options: argparse.Namespace, gpus: Sequence[str]) -> None:
    modes = ["latency", "ttft"] + ["throughput"] * (options.dataset is not None and job.model in options.throughput)
    began = time.monotonic()
    arguments = ["--modes", ",".join(modes), "--batch-sizes", options.batch_sizes, "--ttft-lens", options.ttft_lens]
    arguments += ["--repeats", str(options.repeats)]
    if job.model in options.num_prompts:
        arguments += ["--num-prompts", str(options.num_prompts[job.model])]
    if job.peer:
        arguments += ["--model-config", str(MODELS / job.model), "--tp", str(job.size)]
        arguments += ["--out", str(vllm_results(options))]
        arguments += [] if options.dataset is None else ["--dataset-lens", str(options.dataset)]
        program = f". {shlex.quote(str(options.vllm_env))} && exec {shlex.quote(sys.executable)} " + shlex.join(
            [str(options.vllm_bench), *arguments]
        )
        await call(["bash", "-c", program], options.log.with_suffix(".vllm.log"), gpus)
    else:
        arguments += ["--model-config", job.model, "--tensor-parallel-size", str(job.size)]
        arguments += ["--json", str(options.json)]
        arguments += [] if options.dataset is None else ["--dataset", str(options.dataset)]
        await call([sys.executable, str(HERE / "bench_gpu.py"), *arguments], options.log, gpus)
    took = time.monotonic() - began
    print(f"{'vLLM, ' * job.peer}{job.model} on GPU {','.join(gpus)}: {took:.0f} s", file=sys.stderr, flush=True)


def vllm_results(options: argparse.Namespace) -> Path:
    return Path(options.json).with_name("vllm.jsonl")


async def collectives(options: argparse.Namespace, count: int) -> None:
    options.comm.unlink(missing_ok=True)
    for size in (size for size in options.sizes if 1 < size <= count):
        part = options.comm.with_suffix(f".{size}")
        arguments = [
            sys.executable,
            str(HERE / "bench_comm.py"),
            "--world-size",
            str(size),
            "--only",
            "all_reduce",
            "--json",
            str(part),
        ]
        await call(arguments, options.log)
        if part.exists():
            with options.comm.open("a") as file:
                file.write(part.read_text())
            part.unlink()


def sums_of(records: Sequence[Record], size: int) -> Sums:
    """The all-reduces as the engine makes them: one shot of small ones, two of large ones, both where they stand."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.get("collective") == "all_reduce" and record["gpus"] == size:
            found[record["bytes"]][record["kind"]] = record["us"]
    sizes = sorted(found)
    best = ("staged" if each <= ONE_SHOT_BYTES.get(size, 0) else "in place" for each in sizes)
    kinds = [kind if kind in found[each] else "nccl" for kind, each in zip(best, sizes, strict=True)]
    return Sums(sizes, [found[each][kind] for each, kind in zip(sizes, kinds, strict=True)])


@dataclass(frozen=True, slots=True)
class Line:
    """One figure on `size` GPUs. sums, predicted (at least, at most): None for throughput, which is no single step."""

    what: str
    size: int
    value: float
    speed_up: float
    sums: float | None
    predicted: tuple[float, float] | None


def lines(name: str, records: Sequence[Record], comm: Sequence[Record], limits: Limits) -> Iterator[Line]:
    """Times in milliseconds, rates in output tokens/s."""
    config = json.loads((MODELS / name / "config.json").read_text())
    model = Model(load_config(MODELS / name), shape_of(config), limits)
    mine = [record for record in records if record.get("model") == name]
    sizes = sorted({record["tp"] for record in mine})
    values = {size: medians(mine, size) for size in sizes}
    about: dict[Any, Record] = {(r["mode"], r.get("batch") or r.get("input_len")): r for r in mine}
    for key, one in values.get(1, {}).items():
        mode, what = key
        if mode == "start":
            continue
        for size in (size for size in sizes if key in values[size]):
            value, summed, predicted = values[size][key], None, None
            if mode != "throughput" and size > 1:
                summed, least, most = modelled(model, about[key], one / 1e3, size, sums_of(comm, size))
                summed, predicted = summed * 1e3, (least * 1e3, most * 1e3)
            speed_up = value / one if mode == "throughput" else one / value
            yield Line(f"{mode} {what}", size, value, speed_up, summed, predicted)


def modelled(model: Model, record: Record, one: float, ranks: int, sums: Sums) -> tuple[float, float, float]:
    """Seconds of all sums, and of the whole step, predicted at least and at most."""
    if record["mode"] == "latency":
        batch, context = record["batch"], record["context"] + record["output_len"] / 2
        shared, alone = model.decode(ranks, batch, context), model.decode(1, batch, context)
        summed = model.summed(sums, batch)
    else:
        shared, alone = model.prefill(ranks, record["input_len"]), model.prefill(1, record["input_len"])
        summed = model.summed(sums, record["input_len"])
    return summed, *predict(alone, one, shared, summed)


def beside(name: str, ours: Sequence[Record], theirs: Sequence[Record]) -> Iterator[str]:
    """Ours, vLLM's and the ratio, above 1 where ours is ahead; nothing where vLLM did not run."""
    mine, peers = ([record for record in side if record.get("model") == name] for side in (ours, theirs))
    sizes = sorted({record.get("tp", 1) for record in peers})
    if sizes:
        yield from ("| | GPUs | ours | vLLM | ratio |", "|---|---|---|---|---|")
    for size in sizes:
        own, other = medians(mine, size), medians(peers, size)
        for mode, what in sorted(own.keys() & other.keys(), key=str):
            a, b = own[mode, what], other[mode, what]
            ratio = a / b if mode == "throughput" else b / a
            yield f"| {mode} {what} | {size} | {a:,.2f} | {b:,.2f} | {ratio:.2f} |"


def table(found: Sequence[Line]) -> Iterator[str]:
    yield "| | GPUs | measured | speed-up | efficiency | sums | share | predicted | within |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for line in found:
        cells = [line.what, str(line.size), f"{line.value:,.2f}", f"{line.speed_up:.2f}"]
        cells.append(f"{line.speed_up / line.size:.0%}")
        if line.sums is None or line.predicted is None:
            cells += [""] * 4
        else:
            least, most = line.predicted
            cells += [f"{line.sums:.2f}", f"{line.sums / line.value:.0%}", f"{least:,.2f} to {most:,.2f}"]
            outside = line.value / (least if line.value < least else most) - 1
            cells.append("yes" if least <= line.value <= most else f"off by {outside:+.0%}")
        yield "| " + " | ".join(cells) + " |"


def sums_table(comm: Sequence[Record], sizes: Sequence[int]) -> Iterator[str]:
    """Microseconds of one all-reduce, as the engine makes it."""
    known = {size: sums_of(comm, size) for size in sizes}
    known = {size: sums for size, sums in known.items() if sums.sizes}
    yield "| all-reduce of | " + " | ".join(f"{size} GPUs, µs" for size in known) + " |"
    yield "|---" * (len(known) + 1) + "|"
    for length in sorted({length for sums in known.values() for length in sums.sizes}):
        cells = [f"{sums.seconds(length) * 1e6:.1f}" for sums in known.values()]
        yield f"| {length >> 10} KB | " + " | ".join(cells) + " |"


def plot(every: dict[str, list[Line]], file: Path) -> None:
    """Speed-ups over the number of GPUs, measured (lines) and predicted (bars). Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(every), 4.2), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(every), squeeze=False)[0], every.items(), strict=True):
        most = max(line.size for line in found)
        axes.plot([1, most], [1, most], color="0.8", linewidth=1, label="linear")
        for shift, what in enumerate(dict.fromkeys(line.what for line in found)):
            mine = [line for line in found if line.what == what]
            place = [line.size + 0.03 * shift for line in mine]
            (drawn,) = axes.plot(place, [line.speed_up for line in mine], "o-", label=what, markersize=4)
            for x, line in zip(place, mine, strict=True):
                if line.predicted is not None:
                    ends = [mine[0].value / seconds for seconds in line.predicted]
                    axes.plot([x, x], ends, color=drawn.get_color(), alpha=0.35, linewidth=5)
        axes.set(title=name, xlabel="GPUs", ylabel="speed-up (bar: predicted)", xticks=range(1, most + 1))
        axes.legend(fontsize="small")
    figure.savefig(file)


def report(options: argparse.Namespace) -> None:
    records, comm = read(options.json), read(options.comm)
    measured = read(options.limits)[-1]
    limits = Limits(measured["copy_tb_s"] * 1e12, measured["bf16_tflop_s"] * 1e12)
    print(f"{measured['gpu']}: {measured['copy_tb_s']} TB/s copied, {measured['bf16_tflop_s']} TFLOP/s in bf16")
    every = {name: list(lines(name, records, comm, limits)) for name in options.models}
    every = {name: found for name, found in every.items() if found}
    for name, found in every.items():
        print(f"\n{name}, random weights; ms, or output tokens/s\n")
        print("\n".join(table(found)))
        print("\n" + "\n".join(beside(name, records, read(vllm_results(options)))))
    print("\n" + "\n".join(sums_table(comm, options.sizes)))
    if options.plot is not None and every:
        plot(every, options.plot)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["llama-3.1-8b", "llama-3.3-70b-half"]
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to append what is measured")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing")
    parser.add_argument("--comm", type=Path, required=True, metavar="FILE", help="times of the collectives")
    parser.add_argument("--limits", type=Path, metavar="FILE", help="default: beside --comm")
    parser.add_argument("--log", type=Path, default=Path("bench_scaling.log"), help="what the programs say")
    parser.add_argument("--models", type=lambda text: text.split(","), default=names)
    parser.add_argument(
        "--throughput", type=lambda text: text.split(","), default=names[:1], help="models of --dataset"
    )
    parser.add_argument("--sizes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 3, 2, 4])
    parser.add_argument("--batch-sizes", default="1,32,256")
    parser.add_argument("--ttft-lens", default="2048,8192")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--num-prompts", type=counts, default={}, metavar="MODEL=N,...", help="fewer of the dataset")
    parser.add_argument("--jobs", type=jobs_of, default=[], metavar="[vllm:]MODEL:SIZE,...", help="in this order")
    parser.add_argument("--vllm-bench", type=Path, metavar="FILE.py", help="as for bench_vs_vllm.sh")
    parser.add_argument("--vllm-env", type=Path, metavar="FILE.sh", help="sourced for vLLM alone")
    parser.add_argument("--parts", type=parts_of, default=["model", "comm"], help="in this order: %(default)s")
    parser.add_argument("--one-at-a-time", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    options = parser.parse_args()
    if (options.json is None) == (options.source is None):
        parser.error("give --json to measure, or --from")
    if any(job.peer for job in options.jobs) and None in (options.vllm_bench, options.vllm_env):
        parser.error("jobs of vLLM need --vllm-bench and --vllm-env")
    options.limits = options.limits or options.comm.with_name("limits.json")
    return options


def parts_of(text: str) -> list[str]:
    found = text.split(",")
    if not set(found) <= {"model", "comm"}:
        raise argparse.ArgumentTypeError(f"{text}: model and comm are the parts")
    return found


def jobs_of(text: str) -> list[Job]:
    jobs = []
    for part in text.split(","):
        *peer, model, size = part.split(":")
        if peer not in ([], ["vllm"]):
            raise argparse.ArgumentTypeError(f"{part}: MODEL:SIZE or vllm:MODEL:SIZE")
        jobs.append(Job(model, int(size), bool(peer)))
    return jobs


def counts(text: str) -> dict[str, int]:
    return {model: int(count) for model, count in (part.split("=", 1) for part in text.split(","))}


async def everything(options: argparse.Namespace) -> None:
    gpus = Gpus(visible())
    if not gpus.names:
        raise SystemExit("there is no GPU here")
    for part in options.parts:
        await (collectives(options, len(gpus.names)) if part == "comm" else measure(options, gpus))


def visible() -> list[str]:
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(number) for number in range(torch.cuda.device_count())]


def main() -> int:
    options = parse()
    if options.source is None:
        asyncio.run(everything(options))
    else:
        options.json = options.source
    report(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
