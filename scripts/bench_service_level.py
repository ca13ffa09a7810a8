#!/usr/bin/env python
"""What a target time between tokens buys, and what it costs: measured on CPUs, simulated for a GPU.

    .venv/bin/python scripts/bench_service_level.py [--json FILE] [--plot FILE.svg] [--only measured,simulated]
        [--targets none,0.2,0.1,0.05] [--gpu-targets none,0.04,0.03,0.02,0.015,0.01] [--seconds 35]

Two kinds of requests arrive at random, each as a Poisson process, the same for every target: chats, which are read as
they are written, and documents, long prompts with a short answer. One service for each target of --targets serves them
on CPUs, after a warm-up from which it learns what its steps cost. The simulator serves more and longer ones with the
step costs of Llama 3.1 8B on an H100, for each target of --gpu-targets: the same numbers on every machine.

Reported: `between`, the gaps that readers of chats see between two deliveries (in the simulation: between the tokens of
all rows), and the share of them within the target; time per output token of chats; time to the first token of chats and
of documents; output and prompt tokens/s until the last has ended. The measured part needs a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from treadle import LLM, SamplingParams
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.simulation import PRESETS, Fleet, Workload, simulate
from treadle.scheduler.simulation.histogram import Histogram
from treadle.scheduler.simulation.report import latencies
from treadle.scheduler.simulation.workload import make_workload

ORDINARY_IDS = (1000, 49_000)  # no special tokens
KINDS = ("chat", "document")
GPU = "h100-llama-3.1-8b"
Target = float | None


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests per second, tokens of a prompt, tokens of an answer."""

    rate: float
    prompt: int
    answer: int


CPU_LOAD = (Kind(0.6, 48, 96), Kind(0.12, 1024, 16))
GPU_LOAD = (Kind(16.0, 256, 256), Kind(0.8, 8192, 64))
GPU_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Point:
    """How it went with one target; times in seconds. within: share of the gaps that are no longer than the target."""

    target: Target
    between_p50: float
    between_p99: float
    within: float | None
    tpot_p50: float
    tpot_p99: float
    ttft_chat_p50: float
    ttft_chat_p99: float
    ttft_document_p50: float
    ttft_document_p99: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float


# ── what comes ──


def draw(load: tuple[Kind, Kind], seconds: float, seed: int) -> Workload:
    """Both kinds as tenants; at least one of each comes."""
    random = np.random.Generator(np.random.PCG64(seed))
    parts = [_arrivals(random, kind.rate, seconds) for kind in load]
    which = np.repeat(np.arange(len(load)), [len(part) for part in parts])
    return make_workload(
        np.concatenate(parts),
        np.array([kind.prompt for kind in load])[which],
        np.array([kind.answer for kind in load])[which],
        tenant=which,
        tenants=KINDS,
    )


def _arrivals(random: np.random.Generator, rate: float, seconds: float) -> npt.NDArray[np.float64]:
    at = np.cumsum(random.exponential(1 / rate, int(3 * rate * seconds) + 20))
    return np.concatenate((at[:1] % seconds, at[1:][at[1:] < seconds]))


# ── on CPUs ──


class Measured:
    """Serves a workload, and notes what readers see."""

    def __init__(self, llm: LLM, load: Workload, seed: int) -> None:
        self._llm = llm
        self._load = load
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._gaps: list[float] = []
        self._tpot: list[float] = []
        self._ttft: dict[str, list[float]] = {kind: [] for kind in KINDS}

    async def run(self, target: Target) -> Point:
        began = time.perf_counter()
        tasks = []
        for index, at in enumerate(self._load.arrival.tolist()):
            await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
            tasks.append(asyncio.create_task(self._one(index)))
        await asyncio.gather(*tasks)
        tokens = int(self._load.outputs.sum()), int(self._load.inputs.sum())
        gaps = np.array(self._gaps)
        within = None if target is None else float((gaps <= target).mean())
        return point(target, gaps, within, self._tpot, self._ttft, tokens, time.perf_counter() - began)

    async def _one(self, index: int) -> None:
        load = self._load
        kind = KINDS[load.tenant[index]]
        prompt = self._random.integers(*ORDINARY_IDS, load.inputs[index]).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=int(load.outputs[index]), ignore_eos=True)
        began, times = time.perf_counter(), list[float]()
        async for _ in self._llm.generate(prompt, params):
            times.append(time.perf_counter())
        self._ttft[kind].append(times[0] - began)
        if kind == "chat":
            self._gaps += np.diff(times).tolist()
            self._tpot.append((times[-1] - times[0]) / max(1, len(times) - 1))


async def measure(options: argparse.Namespace, target: Target) -> Point:
    sizes = {"tensor_parallel_size": options.ranks, "max_num_seqs": 32, "prefix_cache": False}
    async with LLM(options.model, target_tpot=target, **sizes) as llm:
        warm_up = draw(CPU_LOAD, min(8.0, options.seconds), seed=options.seed + 1)
        await Measured(llm, warm_up, seed=1).run(target)
        return await Measured(llm, draw(CPU_LOAD, options.seconds, options.seed), seed=2).run(target)


# ── on a GPU that is not there ──


def simulated(target: Target, seconds: float, seed: int) -> Point:
    config = CoreConfig(num_blocks=26_000, vocab_size=32_768, max_model_len=16_384, target_tpot=target)
    load = draw(GPU_LOAD, seconds, seed)
    parts = simulate(Fleet(config=config, costs=PRESETS[GPU]), load)
    found, result = latencies(load, parts), parts[0].result
    gaps = Histogram(result.between)
    between = np.array([gaps.percentile(50), gaps.percentile(99)])
    ttft = {name: found.ttft[load.tenant == number].tolist() for number, name in enumerate(KINDS)}
    tokens = int(load.outputs.sum()), int(load.inputs.sum())
    within = None if target is None else gaps.share_within(target)
    return point(target, between, within, found.tpot[load.tenant == 0].tolist(), ttft, tokens, result.seconds)


# ── what is told ──


def point(
    target: Target,
    gaps: npt.NDArray[np.float64],
    within: float | None,
    tpot: list[float],
    ttft: dict[str, list[float]],
    tokens: tuple[int, int],
    seconds: float,
) -> Point:
    """gaps: all of them, or their median and 99th percentile. tokens: of outputs and of prompts."""
    between = gaps if gaps.size == 2 else np.percentile(gaps, (50, 99))
    times = [*between, *np.percentile(tpot, (50, 99))]
    for kind in KINDS:
        times += np.percentile(ttft[kind], (50, 99)).tolist()
    told = [float(f"{value:.4g}") for value in times]
    rates = [round(count / seconds, 1) for count in tokens]
    return Point(target, *told[:2], None if within is None else round(within, 4), *told[2:], *rates)


def table(points: list[Point]) -> str:
    """Milliseconds, as Markdown."""
    lines = [
        "| target | between tokens p50 / p99 | within | TPOT of chats p50 / p99 | TTFT of chats p50 / p99 "
        "| TTFT of documents p50 / p99 | output tokens/s |",
        "|---" * 7 + "|",
    ]
    for p in points:
        pairs = [
            f"{_ms(p.between_p50)} / {_ms(p.between_p99)}",
            "" if p.within is None else f"{p.within:.1%}",
            f"{_ms(p.tpot_p50)} / {_ms(p.tpot_p99)}",
            f"{_ms(p.ttft_chat_p50)} / {_ms(p.ttft_chat_p99)}",
            f"{_ms(p.ttft_document_p50)} / {_ms(p.ttft_document_p99)}",
            f"{p.output_tokens_per_s:,.0f}",
        ]
        lines.append(f"| {'none' if p.target is None else _ms(p.target)} | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def plot(path: Path, found: dict[str, list[Point]]) -> None:
    """For each part: the longest gaps of those who read against the wait of those who bring documents."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "treadle", "svg.fonttype": "none"}):
        figure = Figure(figsize=(5.5 * len(found), 4.2), layout="constrained")
        for axes, (name, points) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items(), strict=True):
            axes.plot([p.between_p99 * 1e3 for p in points], [p.ttft_document_p50 * 1e3 for p in points], "o-")
            for p in points:
                label = "no target" if p.target is None else f"{p.target * 1e3:g} ms"
                at = p.between_p99 * 1e3, p.ttft_document_p50 * 1e3
                axes.annotate(label, at, (5, 5), textcoords="offset points")
            axes.set(title=name, xlabel="between tokens, p99, ms", ylabel="first token of a document, median, ms")
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3, which="both")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def targets(text: str) -> list[Target]:
    return [None if part == "none" else float(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="measured,simulated")
    parser.add_argument("--targets", type=targets, default=targets("none,0.2,0.1,0.05"))
    parser.add_argument("--gpu-targets", type=targets, default=targets("none,0.04,0.03,0.02,0.015,0.01"))
    parser.add_argument("--seconds", type=float, default=35.0, help="of arrivals on CPUs, for each target")
    parser.add_argument("--gpu-seconds", type=float, default=GPU_SECONDS, help="of arrivals in the simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="where to draw them; needs matplotlib")
    options = parser.parse_args()
    found: dict[str, list[Point]] = {}
    for part in options.only.split(","):
        if part == "measured":
            found[part] = [asyncio.run(measure(options, target)) for target in options.targets]
        elif part == "simulated":
            found[part] = [simulated(target, options.gpu_seconds, options.seed) for target in options.gpu_targets]
        else:
            parser.error(f"--only: {part!r}; there are measured and simulated")
        print(f"{part}, ms\n\n{table(found[part])}\n")
    if options.json is not None:
        figures: dict[str, Any] = {part: [asdict(p) for p in points] for part, points in found.items()}
        loads = {"measured": [asdict(k) for k in CPU_LOAD], "simulated": [asdict(k) for k in GPU_LOAD]}
        options.json.write_text(json.dumps({"loads": loads, **figures}, indent=1) + "\n")
    if options.plot is not None:
        plot(options.plot, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
