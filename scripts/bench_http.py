"""What the HTTP gateway costs: streaming over HTTP beside the embedded API, in turns.

    .venv/bin/python scripts/bench_http.py [--json FILE] [--rounds 20] [--concurrency 32] [--tensor-parallel-size 2]

An embedded `LLM` and a `treadle serve --http` of the same model stand beside each other, and waves of the same requests
go to one and then the other: 16 words, 64 new tokens, greedy, end of sequence ignored, no cached prefix, every output
read as it comes. The ratio is the median over the rounds; error: the standard error of their geometric mean, since a
wave on a shared host can take twice as long as the next. stolen: share of the machine's time that its host took
(/proc/stat), null where that is not told. TTFT is measured one request at a time on idle engines, in turns too; over
HTTP from the first byte sent to the first event read. The client's work happens on the same cores, so there is as
little of it as can be: what comes from a socket is put together, and not looked into. Both sides are read on uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvloop

from treadle import LLM, SamplingParams

WORDS = (
    "time",
    "person",
    "year",
    "way",
    "day",
    "thing",
    "man",
    "world",
    "life",
    "hand",
    "part",
    "child",
    "eye",
    "woman",
)
LENGTH = 16
Ask = Callable[[str, int], Awaitable[tuple[float, int]]]
"""(prompt, new tokens) to (seconds to the first output, tokens written)."""


def main() -> int:
    options = _options()
    result = uvloop.run(_measure(options))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--tensor-parallel-size", type=int, default=2)
    parser.add_argument("--ttft-requests", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16")
    return parser.parse_args()


async def _measure(options: argparse.Namespace) -> dict[str, Any]:
    sizes = {"tensor_parallel_size": options.tensor_parallel_size, "max_num_seqs": options.concurrency}
    with _served(options) as (host, port):
        async with LLM(options.model, dtype=options.dtype, prefix_cache=False, **sizes) as llm:
            sides: dict[str, Ask] = {"embedded": _embedded(llm), "http": _http(host, port)}
            rates: dict[str, list[float]] = {name: [] for name in sides}
            first: dict[str, list[float]] = {name: [] for name in sides}
            for ask in sides.values():
                await _wave(ask, options, seed=0)
            before = _host_time()
            for turn in range(1, options.rounds + 1):
                for name in sorted(sides, reverse=turn % 2 == 0):
                    rates[name].append(await _wave(sides[name], options, seed=turn))
            after = _host_time()
            for turn in range(options.ttft_requests):
                for name in sorted(sides, reverse=turn % 2 == 0):
                    first[name].append((await sides[name](_prompt(random.Random(10_000 + turn)), 2))[0])
    ratios = [http / embedded for http, embedded in zip(rates["http"], rates["embedded"], strict=True)]
    logs = [math.log(ratio) for ratio in ratios]
    ttft = {name: 1000 * statistics.median(values) for name, values in first.items()}
    return {
        "model": options.model,
        "ranks": options.tensor_parallel_size,
        "cores": len(os.sched_getaffinity(0)),
        "concurrency": options.concurrency,
        "tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "error": statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else None,
        "stolen": (after[0] - before[0]) / (after[1] - before[1]) if before and after else None,
        "ratios": ratios,
        "ttft_ms": ttft,
        "added_ttft_ms": ttft["http"] - ttft["embedded"],
    }


async def _wave(ask: Ask, options: argparse.Namespace, seed: int) -> float:
    """Output tokens/s of one wave of requests at once, prefill included."""
    source = random.Random(seed)
    prompts = [_prompt(source) for _ in range(options.concurrency)]
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(prompt, options.max_tokens) for prompt in prompts))
    took = time.perf_counter() - began
    written = [count for _, count in answers]
    if set(written) != {options.max_tokens}:
        raise RuntimeError(f"answers of {set(written)} tokens where {options.max_tokens} were asked for")
    return sum(written) / took


def _host_time() -> tuple[int, int] | None:
    """Ticks that the host took from this machine so far, and all ticks; None where the system does not say."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    ticks = [int(field) for field in line.split()[1:9]]
    return (ticks[7], sum(ticks)) if len(ticks) == 8 and sum(ticks) else None


def _prompt(source: random.Random) -> str:
    return " ".join(source.choice(WORDS) for _ in range(LENGTH))


def _embedded(llm: LLM) -> Ask:
    async def ask(prompt: str, max_tokens: int) -> tuple[float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)):
            first = first or time.perf_counter() - began
            count = len(output.token_ids)
        return first, count

    return ask


def _http(host: str, port: int) -> Ask:
    idle: list[_Connection] = []

    async def ask(prompt: str, max_tokens: int) -> tuple[float, int]:
        loop = asyncio.get_running_loop()
        connection = idle.pop() if idle else (await loop.create_connection(_Connection, host, port))[1]
        fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({**fields, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        began = time.perf_counter()
        answer, first = await connection.ask(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        idle.append(connection)
        usage = answer[answer.rindex(b'"completion_tokens":') :]
        return first - began, int(usage.split(b":")[1].split(b",")[0])

    return ask


class _Connection(asyncio.Protocol):
    """Asks one thing at a time, and keeps the answer as it comes."""

    def __init__(self) -> None:
        self._answer = bytearray()
        self._first = 0.0
        self._done: asyncio.Future[tuple[bytes, float]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    async def ask(self, request: bytes) -> tuple[bytes, float]:
        """The answer, and when its first event came."""
        if self._transport.is_closing():
            raise RuntimeError("the server closed an idle connection")
        self._answer.clear()
        self._first = 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        answer += data
        if not self._first and b"data: " in answer:
            self._first = time.perf_counter()
        if answer.endswith(b"\r\n0\r\n\r\n") and not self._done.done():
            self._done.set_result((bytes(answer), self._first))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(f"the connection was closed: {bytes(self._answer[:500])!r}"))


@contextmanager
def _served(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    with tempfile.TemporaryDirectory(prefix="bh-") as directory:
        command = [sys.executable, "-m", "treadle", "serve", options.model, "--http", "127.0.0.1:0"]
        command += ["--endpoint", f"ipc://{directory}/service.ipc", "--dtype", options.dtype, "--no-prefix-cache"]
        command += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
        command += ["--max-num-seqs", str(options.concurrency)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError("the server did not start; its standard error is above")
            host, _, port = process.stdout.readline().strip().rpartition("//")[2].partition(":")
            yield host, int(port)
        finally:
            process.terminate()
            process.wait(30)


if __name__ == "__main__":
    sys.exit(main())
