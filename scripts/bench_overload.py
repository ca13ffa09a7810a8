"""Ten times more load than the server can take: who is accepted is served as before, the others are told at once.

    python scripts/bench_overload.py --seconds 300 --json overload.json

A `treadle serve` with `--rows` rows, where nobody waits for one. At capacity, the run called 1x: as many requests at a
time as it has room for, one after the other, begun at even distances, so that no row is ever empty and rows do not end
all in one step. How many these are in a second is the capacity at that time, whatever the machine's speed is then. Ten
times as many then come at even distances, from 64 clients in turn, whether or not earlier ones have ended. Who is
refused does not come again. Then 1x again: the speed of virtual machines drifts, so both halves together are what 10x
is compared with, by the time of accepted requests from the call to the last token. A refusal is timed from the call to
the error. Exit code 0 when the median and the 99th percentile of 10x are at most 20% above those of 1x, every refusal
is under 50 ms, nothing else went wrong, and the server's memory did not grow.

The load runs on the machine that it measures, in one process that looks for no garbage meanwhile. It stands for other
machines; what it takes from the ranks, `cpu_share` says. Of each refusal that took longer, and of the slowest of those
accepted, the report says who was late (`holdups.py`): the host, where this is a virtual machine that stood still; the
load, the server or a rank, which waited for a core or worked. `refusals_over_50_ms_of_our_own` leaves out the host's
time; the exit code does not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from holdups import held_up, look

from treadle import Client, SamplingParams
from treadle.errors import Overloaded, TreadleError

_MOST_LATENCY = 1.2
_MOST_REFUSAL_MS = 50.0
_MOST_GROWTH_MB = 32.0
_SAMPLE_SECONDS = 0.5
_AGAIN_SECONDS = 0.02
_SHOWN = 5


@dataclass
class Phase:
    """What happened to the requests of one phase. Times in seconds; memory: of the server, bytes.

    slow: what `held_up` says of the refusals that took too long. slowest: the same of accepted requests, those that
    took longest. cpu: seconds of a core that each process had, by name.
    """

    offered: int = 0
    latency: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    refusal: list[float] = field(default_factory=list)
    slow: list[dict[str, float]] = field(default_factory=list)
    slowest: list[dict[str, float]] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Phase) -> None:
        """Its requests count here, too."""
        self.offered += other.offered
        self.latency += other.latency
        self.first += other.first
        self.refusal += other.refusal
        self.slow += other.slow
        self.note_slowest(*other.slowest)
        self.errors += other.errors

    def note_slowest(self, *accepted: dict[str, float]) -> None:
        self.slowest = sorted([*self.slowest, *accepted], key=lambda slow: -slow["ms"])[:_SHOWN]

    def summary(self) -> dict[str, object]:
        return {
            "seconds": round(self.seconds, 1),
            "offered": self.offered,
            "accepted": len(self.latency),
            "refused": len(self.refusal),
            "errors": dict(self.errors),
            "accepted_per_s": round(len(self.latency) / self.seconds, 2),
            "latency_ms": spread(self.latency),
            "ttft_ms": spread(self.first),
            "refusal_ms": spread(self.refusal),
            "slow_refusals": self.slow,
            "slowest_accepted": self.slowest,
            "cpu_share": {name: round(seconds / self.seconds, 3) for name, seconds in self.cpu.items()},
            "server_rss_mb": [round(size / 1e6, 1) for size in (self.memory[0], max(self.memory), self.memory[-1])],
        }


def spread(times: list[float]) -> dict[str, float]:
    """Milliseconds."""
    if not times:
        return {}
    names = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    ordered = sorted(times)
    shares = {name: ordered[min(int(share * len(ordered)), len(ordered) - 1)] for name, share in names.items()}
    return {name: round(value * 1e3, 2) for name, value in {"mean": statistics.fmean(times), **shares}.items()}


class Load:
    """Requests to one server from several clients, all of the same size and none of them alike."""

    def __init__(self, options: argparse.Namespace, clients: list[Client], server: psutil.Process) -> None:
        self._options = options
        self._clients = clients
        self._server = server
        self._processes = {"load": psutil.Process(), "server": server}
        self._processes |= {f"rank_{number}": rank for number, rank in enumerate(server.children())}
        self._pids = {name: process.pid for name, process in self._processes.items()}
        self._random = random.Random(options.seed)
        self._running: set[asyncio.Task[bool]] = set()

    async def capacity(self, seconds: float, apart: float = 0.0) -> Phase:
        """As many requests at a time as there is room for, until `seconds` have gone after the last of them began.

        apart: seconds from one to the next in the beginning. What ends before the last has begun counts not.
        """
        filling, phase = Phase(), Phase()
        room = self._options.rows + self._options.queue
        counts = time.perf_counter() + apart * (room - 1)

        async def one_after_the_other(number: int) -> None:
            await asyncio.sleep(apart * number)
            client = self._clients[number % len(self._clients)]
            while time.perf_counter() < counts + seconds:
                one = Phase()
                if not await self._request(client, one):
                    await asyncio.sleep(_AGAIN_SECONDS)
                (phase if counts <= time.perf_counter() < counts + seconds else filling).add(one)

        everybody = asyncio.gather(*(one_after_the_other(number) for number in range(room)))
        await asyncio.sleep(counts - time.perf_counter())
        with self._counted(phase):
            phase.memory.append(self._server.memory_info().rss)
            await asyncio.sleep(counts + seconds - time.perf_counter())
            phase.memory.append(self._server.memory_info().rss)
        await everybody
        return phase

    async def offer(self, rate: float, seconds: float) -> Phase:
        """`rate` requests a second, evenly spaced. What comes before the server is as full as it will be counts not."""
        phase = Phase()
        await self._send(rate, self._options.fill_seconds, Phase())
        sampler = asyncio.create_task(self._sample(phase))
        with self._counted(phase):
            await self._send(rate, seconds, phase)
        await asyncio.gather(*self._running)
        sampler.cancel()
        return phase

    async def _send(self, rate: float, seconds: float, phase: Phase) -> None:
        """Does not wait for the last ones."""
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            task = asyncio.create_task(self._request(self._clients[number % len(self._clients)], phase))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    @contextmanager
    def _counted(self, phase: Phase) -> Iterator[None]:
        """How long it lasts, and what each process does meanwhile."""
        began, before = time.perf_counter(), self._cpu()
        yield
        phase.seconds = time.perf_counter() - began
        phase.cpu = {name: seconds - before[name] for name, seconds in self._cpu().items()}

    def _cpu(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: spent.user + spent.system for name, spent in times.items()}

    async def _request(self, client: Client, phase: Phase) -> bool:
        """Whether it was accepted and ended."""
        phase.offered += 1
        prompt = [self._random.randrange(client.server.vocab_size) for _ in range(self._options.prompt)]
        params = SamplingParams(temperature=0.0, max_tokens=self._options.tokens, ignore_eos=True)
        before = look(self._pids)
        began = time.perf_counter()
        try:
            output = await client.generate(prompt, params).final()
        except Overloaded:
            phase.refusal.append(time.perf_counter() - began)
            if phase.refusal[-1] * 1e3 >= _MOST_REFUSAL_MS:
                phase.slow.append(held_up(before, look(self._pids)))
        except TreadleError as error:
            phase.errors[type(error).__name__] += 1
        else:
            phase.latency.append(time.perf_counter() - began)
            phase.first.append(output.ttft or 0.0)
            phase.note_slowest(held_up(before, look(self._pids)))
            return True
        return False

    async def _sample(self, phase: Phase) -> None:
        while True:
            phase.memory.append(self._server.memory_info().rss)
            await asyncio.sleep(_SAMPLE_SECONDS)


@contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    with tempfile.TemporaryDirectory(prefix="o-") as directory:
        endpoint = f"ipc://{directory}/s.ipc"
        command = [sys.executable, "-m", "treadle", "serve", options.model, "--endpoint", endpoint]
        command += ["--tensor-parallel-size", str(options.ranks), "--max-num-seqs", str(options.rows)]
        command += ["--max-waiting-requests", str(options.queue)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "XDG_RUNTIME_DIR": directory})
        try:
            assert process.stdout is not None
            if b"ready" not in process.stdout.readline():
                raise SystemExit("the server did not start")
            yield endpoint, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


async def measure(options: argparse.Namespace, endpoint: str, server: psutil.Process) -> dict[str, object]:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(endpoint)) for _ in range(options.clients)]
        load = Load(options, clients, server)
        gc.freeze()
        gc.disable()  # a pause of the load must not count as one of the server
        warm = await load.capacity(options.warm_seconds)
        apart = statistics.fmean(warm.latency) / (options.rows + options.queue) if warm.latency else 0.0
        before = await load.capacity(options.seconds / options.shorter / 2, apart)
        rate = len(before.latency) / before.seconds
        many = await load.offer(options.times * rate, options.seconds)
        after = await load.capacity(options.seconds / options.shorter / 2, apart)
        stats = await clients[0].stats()
    once = Phase()
    for half in (before, after):
        once.add(half)
    return judged(once, many) | {
        "capacity_per_s": round(rate, 2),
        "1x_ms": spread(once.latency),
        "1x_before": before.summary(),
        f"{options.times:g}x": many.summary(),
        "1x_after": after.summary(),
        "blocks_left": stats.blocks_used,
    }


def judged(once: Phase, many: Phase) -> dict[str, object]:
    """The promises, and whether they were kept."""
    before, after, refused = spread(once.latency), spread(many.latency), spread(many.refusal)
    if not before or not after:
        return {"good": False, "why": "nobody was accepted"}
    ratios = {name: round(after[name] / before[name], 3) for name in ("mean", "p50", "p90", "p99")}
    part = max(1, len(many.memory) // 4)
    grown = (statistics.median(many.memory[-part:]) - statistics.median(many.memory[:part])) / 1e6
    good = (
        max(ratios["p50"], ratios["p99"]) <= _MOST_LATENCY
        and bool(refused)
        and refused["max"] < _MOST_REFUSAL_MS
        and not many.errors
        and not once.errors
        and grown < _MOST_GROWTH_MB
    )
    ours = [slow for slow in many.slow if slow["ms"] - slow["stolen_ms"] >= _MOST_REFUSAL_MS]
    return {
        "good": good,
        "latency_ratio": ratios,
        "refusals_over_50_ms": len(many.slow),
        "refusals_over_50_ms_of_our_own": len(ours),
        "server_rss_grown_mb": round(grown, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--queue", type=int, default=0, help="requests that may wait for a row (default %(default)s)")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--times", type=float, default=10.0, help="the capacity (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="of output")
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload (default %(default)s)")
    parser.add_argument(
        "--shorter", type=float, default=2.0, help="1x lasts so much shorter in all (default %(default)s)"
    )
    parser.add_argument("--fill-seconds", type=float, default=10.0, help="of 10x, before it counts")
    parser.add_argument("--warm-seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with served(options) as (endpoint, server):
        result = asyncio.run(measure(options, endpoint, server))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
