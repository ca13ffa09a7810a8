"""A model's shape on GPUs, end to end: throughput, decode steps, time to first token, start-up.

    python scripts/bench_gpu.py --json OUT.jsonl --model-config llama-3.1-8b --modes throughput,latency,ttft \
        --dataset ../shared/data/sharegpt_lens.jsonl

Everything goes through `treadle.LLM`: scheduler, ZeroMQ, engine ranks. THE WEIGHTS ARE RANDOM: the shapes are real, the
answers mean nothing. Prompts are random token ids, all different, prefix cache off, end of sequence ignored.

  throughput  all requests at once; output tokens over the wall time from the first submission to the last token.
              --dataset: a file of JSON lines [input length, output length], or uniform-1k (256 requests, both lengths
              uniform in 100..1024).
  latency     --batch-sizes N,...: N requests of --latency-input-len tokens; the time between steps in which all N
              decode, as it arrives at a reader of the last request's stream.
  ttft        --ttft-lens L,...: wall time of one request of L tokens for one new token.
Start-up is measured always: from the start of this process to its first token, and of that the time in `LLM.start`;
where a rank's share of it went is logged on stderr.

One JSON object per line, on stdout and appended to --json. --engine-arg KEY=JSON passes any option of the service, so
that every optimisation can be measured with its switch off. --profile DIR has rank 0 write, for each number of rows
that decodes steadily, how much of the time its GPU was busy; do not take times from such a run.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MODELS = Path(__file__).parent / "models"
UNIFORM = "uniform-1k"
# Tokens of each prompt when decoding warms up: graphs are captured already, so contexts need not be long.
_WARM_UP_INPUT = 64
Lengths = list[tuple[int, int]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-config", required=True, help="a directory with config.json, or a name in models/")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["throughput"])
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=0, help="0: what the modes need")
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--in-process", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--engine-arg", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, metavar="DIR")
    parser.add_argument("--dataset", default=UNIFORM)
    parser.add_argument("--num-prompts", type=int, default=0, help="0: the whole dataset, once")
    parser.add_argument("--batch-sizes", type=integers, default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--latency-input-len", type=int, default=1024)
    parser.add_argument("--latency-output-len", type=int, default=128)
    parser.add_argument("--ttft-lens", type=integers, default=[512, 2048, 8192, 32768])
    parser.add_argument("--ttft-repeats", type=int, default=7)
    return parser.parse_args()


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def model_directory(name: str) -> Path:
    path = Path(name) if Path(name).exists() else MODELS / name
    return path.parent if path.name == "config.json" else path


def dataset(name: str, count: int) -> Lengths:
    """(input, output) lengths; a file is repeated or cut to `count` requests."""
    if name == UNIFORM:
        source = random.Random(0)
        return [(source.randint(100, 1024), source.randint(100, 1024)) for _ in range(count or 256)]
    with open(name) as file:
        rows = [(int(first), int(second)) for first, second in map(json.loads, filter(str.strip, file))]
    return [rows[index % len(rows)] for index in range(count or len(rows))]


@dataclass(slots=True)
class Watched:
    """A request of a latency run: when its first token came, when its last, and every reading of the watched one."""

    first: float
    last: float
    readings: list[tuple[float, int]]


class Bench:
    def __init__(self, options: argparse.Namespace, imported: float) -> None:
        from treadle import LLM

        self._options = options
        self._imported = imported
        self._directory = model_directory(options.model_config)
        self._random = random.Random(options.seed)
        self._vocab = int(json.loads((self._directory / "config.json").read_text())["vocab_size"])
        self._lengths = dataset(options.dataset, options.num_prompts) if "throughput" in options.modes else []
        engine = {key: json.loads(value) for key, value in (entry.split("=", 1) for entry in options.engine_arg)}
        self._llm = LLM(
            str(self._directory),
            in_process=options.in_process,
            device=options.device,
            dtype=options.dtype,
            random_weights=True,
            prefix_cache=False,
            tensor_parallel_size=options.tensor_parallel_size,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=options.max_model_len or self._longest() + 16,
            **engine,
        )

    def _longest(self) -> int:
        options = self._options
        lengths = [sum(pair) for pair in self._lengths]
        if "latency" in options.modes:
            lengths.append(options.latency_input_len + options.latency_output_len)
        if "ttft" in options.modes:
            lengths.append(max(options.ttft_lens) + 1)
        return max(lengths, default=1024)

    async def run(self) -> None:
        modes = {"throughput": self.throughput, "latency": self.latency, "ttft": self.ttft}
        unknown = set(self._options.modes) - set(modes) - {"start"}
        if unknown:
            raise SystemExit(f"--modes: {', '.join(sorted(unknown))}? There are start, {', '.join(modes)}")
        began = time.perf_counter()
        async with self._llm:
            started = time.perf_counter() - began
            await self._generate([(16, 1)])
            self.emit(
                mode="start",
                import_s=round(self._imported, 2),
                start_s=round(started, 2),
                process_to_first_token_s=round(process_age(), 2),
            )
            for mode in self._options.modes:
                if mode != "start":
                    await modes[mode]()

    def emit(self, **result: object) -> None:
        options = self._options
        common = {"engine": "treadle", "model": self._directory.name, "weights": "random"}
        common |= {"tp": options.tensor_parallel_size, "temperature": options.temperature}
        if options.engine_arg:
            common["engine_args"] = options.engine_arg
        line = json.dumps(common | result)
        print(line, flush=True)
        if options.json is not None:
            with options.json.open("a") as file:
                file.write(line + "\n")

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocab) for _ in range(count)]

    def _params(self, tokens: int) -> Any:
        from treadle import SamplingParams

        return SamplingParams(temperature=self._options.temperature, max_tokens=tokens, ignore_eos=True)

    async def _generate(self, lengths: Sequence[tuple[int, int]]) -> tuple[float, int]:
        """Wall time of all requests, submitted at once, and the number of output tokens."""
        prompts = [self._ids(size) for size, _ in lengths]
        params = [self._params(tokens) for _, tokens in lengths]
        began = time.perf_counter()
        streams = [self._llm.generate(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        outputs = await asyncio.gather(*(stream.final() for stream in streams))
        return time.perf_counter() - began, sum(len(output.token_ids) for output in outputs)

    async def throughput(self) -> None:
        await self._generate([(size, min(tokens, 32)) for size, tokens in self._lengths[:64]])
        inputs = sum(size for size, _ in self._lengths)
        for _ in range(self._options.repeats):
            seconds, tokens = await self._generate(self._lengths)
            self.emit(
                mode="throughput",
                dataset=Path(self._options.dataset).name,
                num_prompts=len(self._lengths),
                input_tokens=inputs,
                output_tokens=tokens,
                elapsed_s=round(seconds, 4),
                output_tok_s=round(tokens / seconds, 1),
                total_tok_s=round((inputs + tokens) / seconds, 1),
            )

    async def latency(self) -> None:
        options = self._options
        for batch in options.batch_sizes:
            await self._decode(batch, 8, _WARM_UP_INPUT)
            steps: list[float] = []
            for _ in range(options.repeats):
                steps += full_batch_steps(
                    await self._decode(batch, options.latency_output_len, options.latency_input_len)
                )
            if not steps:
                self.emit(mode="latency", batch=batch, error="the batch never decoded all at once")
                continue
            self.emit(
                mode="latency",
                batch=batch,
                context=options.latency_input_len,
                output_len=options.latency_output_len,
                full_batch_steps=len(steps),
                step_ms_mean=round(statistics.fmean(steps), 4),
                step_ms_median=round(statistics.median(steps), 4),
                step_ms_p90=round(sorted(steps)[int(len(steps) * 0.9)], 4),
                decode_tok_s=round(batch * 1e3 / statistics.fmean(steps), 1),
            )

    async def _decode(self, batch: int, tokens: int, input_len: int) -> list[Watched]:
        """`batch` requests at once. The last one is watched: it is the last to begin decoding."""
        prompts = [self._ids(input_len) for _ in range(batch)]
        streams = [self._llm.generate(prompt, self._params(tokens)) for prompt in prompts]
        return await asyncio.gather(*(watch(stream, stream is streams[-1]) for stream in streams))

    async def ttft(self) -> None:
        for length in self._options.ttft_lens:
            for _ in range(2):
                await self._generate([(length, 1)])
            times = [(await self._generate([(length, 1)]))[0] * 1e3 for _ in range(self._options.ttft_repeats)]
            middle = statistics.median(times)
            self.emit(
                mode="ttft",
                input_len=length,
                repeats=len(times),
                ttft_ms_median=round(middle, 3),
                ttft_ms_min=round(min(times), 3),
                prefill_tok_s=round(length * 1e3 / middle, 1),
            )


async def watch(stream: Any, closely: bool) -> Watched:
    readings: list[tuple[float, int]] = []
    if closely:
        async for output in stream:
            readings.append((time.perf_counter(), len(output.outputs[0].delta_token_ids)))
    else:
        output = await stream.final()
    return Watched(output.first_token_time or 0.0, time.perf_counter(), readings)


def full_batch_steps(requests: list[Watched]) -> list[float]:
    """Milliseconds per step, from the readings between the last first token and the first last one."""
    begin = max(request.first for request in requests)
    end = min(request.last for request in requests)
    readings = [reading for reading in requests[-1].readings if begin <= reading[0] <= end]
    # A reading of two tokens is two steps of which the reader saw only the second.
    return [(after - before) * 1e3 / count for (before, _), (after, count) in pairwise(readings) for _ in range(count)]


def process_age() -> float:
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def main() -> int:
    options = parse()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(message)s", stream=sys.stderr)
    if options.profile is not None:
        options.profile.mkdir(parents=True, exist_ok=True)
        os.environ["TREADLE_PROFILE"] = str(options.profile.absolute())
    print(f"RANDOM WEIGHTS in the shape of {options.model_config}: times are real, answers are not", file=sys.stderr)
    import treadle  # noqa: F401  (here, so that --help is quick and its time is known)

    bench = Bench(options, process_age())
    gc.freeze()
    asyncio.run(bench.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
