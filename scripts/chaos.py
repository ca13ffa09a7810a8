"""Random load from several clients while ranks, and the server, are killed, stopped, delayed and spoiled at random.

    python scripts/chaos.py --minutes 30 --json chaos.json            # SmolLM2-135M in fp32 on two ranks
    python scripts/chaos.py --minutes 5 --standby --server-kills --model DIRECTORY

At the end every request has ended exactly once, with the tokens that an undisturbed run of the same server gave before
(fp32, greedy and seeded), all blocks are given back, no process and no file is left, and memory has not grown. Exit
code 0 means that all of this held. Every kind of fault comes once before any comes again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.fuzz_frames import Mutator
from treadle import Client, RequestOutput, SamplingParams
from treadle.errors import DeadlineExceeded, ProtocolError, TreadleError
from treadle.scheduler.options import service_options
from treadle.serve import ServeSettings, run
from treadle.transport.codec import service_codec
from treadle.transport.messages import Drain, Reload

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("kill", "term", "stop", "delay", "spoil", "hostile")
_READY_SECONDS = 300.0
# A rank that was told to spoil its next answer may not have one, or its silence is found by the step's deadline.
_EFFECT_SECONDS = {"delay": 0.2, "hostile": 0.2, "spoil": 12.0, "server": 0.2}
_WARM_ROUNDS = 2
_SAMPLES = 8
_PROMPTS = ("The capital of France is", "Once upon a time", "One two three", "A list of colours:", "Water boils when")


@dataclass(frozen=True)
class Job:
    """A request and what an undisturbed run gives: token ids, text and end of each continuation."""

    prompt: str
    params: SamplingParams
    expected: tuple[tuple[tuple[int, ...], str, str | None], ...] = ()


@dataclass
class Tally:
    """What has happened. recovery: seconds from a fault that cost a group to the next token of anybody."""

    faults: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    exact: int = 0
    aborted: int = 0
    expired: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    recoveries: int = 0
    server_kills: int = 0
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)


def jobs(rng: random.Random, count: int) -> list[Job]:
    """Greedy and seeded, long and short, one or several continuations, penalties, log-probabilities."""
    made = []
    for i in range(count):
        made.append(
            Job(
                f"{rng.choice(_PROMPTS)} {i} " + "and so on " * rng.choice((0, 0, 3, 20)),
                SamplingParams(
                    temperature=float(i % 2),
                    seed=i,
                    max_tokens=rng.choice((4, 20, 40, 80)),
                    n=2 if i % 7 == 1 else 1,
                    ignore_eos=i % 3 != 0,
                    repetition_penalty=1.2 if i % 5 == 2 else 1.0,
                    logprobs=2 if i % 6 == 3 else None,
                ),
            )
        )
    return made


def seen(output: RequestOutput) -> tuple[tuple[tuple[int, ...], str, str | None], ...]:
    return tuple((tuple(part.token_ids), part.text, part.finish_reason) for part in output.outputs)


class Place:
    """The server's process, started again at the same endpoint when it is killed."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.directory = directory
        self.endpoint = f"ipc://{directory}/s.ipc"
        self._options = options
        self.pids: set[int] = set()
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        runtime = self.directory / "run"
        runtime.mkdir(exist_ok=True)
        command = [sys.executable, __file__, "--serve", self.endpoint, "--model", self._options.model]
        command += ["--ranks", str(self._options.ranks)] + ["--standby"] * self._options.standby
        command += ["--max-engine-failures", str(self._options.max_engine_failures)]
        with (self.directory / "server.log").open("ab") as log:
            environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "TMPDIR": str(runtime)}
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if "ready" not in line:
            raise SystemExit(f"the server did not start: {(self.directory / 'server.log').read_text()[-2000:]}")
        return process

    def ranks(self) -> list[int]:
        pids = [child.pid for child in psutil.Process(self.process.pid).children()]
        self.pids.update(pids)
        return pids

    def measure(self, tally: Tally) -> None:
        """What the server itself holds now: bytes and open files."""
        process = psutil.Process(self.process.pid)
        tally.memory.append(int(process.memory_info().rss))
        tally.descriptors.append(process.num_fds())

    async def kill(self) -> None:
        self.ranks()
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        self.process = await asyncio.to_thread(self._start)

    def end(self) -> int:
        self.ranks()
        self.process.terminate()
        return self.process.wait(120)

    def left(self) -> list[str]:
        """Processes and files that should be gone."""
        end = time.monotonic() + 20
        while True:
            alive = [pid for pid in self.pids if psutil.pid_exists(pid) and _runs(pid)]
            files = [str(path) for path in (self.directory / "run").rglob("*") if "dump-" not in path.name]
            left = [f"process {pid}" for pid in alive] + files
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.05)


def _asks_for_the_end(frame: bytes) -> bool:
    """A client over ipc may have the server drain or reload, and would be obeyed."""
    try:
        return isinstance(service_codec().decode(frame), Drain | Reload)
    except ProtocolError:
        return False


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class Chaos:
    """One run. All randomness comes from the seed, though what it meets does not."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        self._options = options
        self._place = place
        self._rng = random.Random(options.seed)
        self._mutator = Mutator(options.seed)
        self._stop = asyncio.Event()
        self._struck = 0.0
        self._clients: list[asyncio.Task[None]] = []
        self.tally = Tally()

    async def run(self) -> None:
        wanted = await self._undisturbed(jobs(self._rng, self._options.jobs))
        self._place.measure(self.tally)
        clients = [asyncio.create_task(self._client(i, wanted)) for i in range(self._options.clients)]
        self._clients = clients
        strikes = asyncio.create_task(self._strike_on())
        await self._pause(self._options.minutes * 60)
        self._enough = True
        await strikes
        self._stop.set()
        await asyncio.gather(*clients, return_exceptions=bool(self.tally.wrong))
        if self.tally.wrong:
            return
        async with Client(self._place.endpoint) as client:
            await self._settled(client)
            stats = await client.stats()
            if stats.blocks_used or stats.running or stats.waiting:
                self.tally.wrong.append(f"something is still held: {stats}")
        self._place.measure(self.tally)

    async def _undisturbed(self, raw: list[Job]) -> list[Job]:
        """More than once: the second time prefixes are cached, and memory is what it will be."""
        async with Client(self._place.endpoint) as client:
            for _ in range(_WARM_ROUNDS):
                outputs = await asyncio.gather(*(client.generate(job.prompt, job.params).final() for job in raw))
            return [Job(job.prompt, job.params, seen(output)) for job, output in zip(raw, outputs, strict=True)]

    # ── load ──

    async def _client(self, number: int, wanted: list[Job]) -> None:
        rng = random.Random(self._options.seed * 1000 + number)
        async with Client(self._place.endpoint, resume=True, resume_timeout=_READY_SECONDS) as client:
            while not self._stop.is_set():
                together = [self._request(client, rng, rng.choice(wanted)) for _ in range(rng.choice((1, 2, 4)))]
                await asyncio.gather(*together)

    async def _request(self, client: Client, rng: random.Random, job: Job) -> None:
        how = rng.choice(("final", "read", "read", "abort", "deadline")) if rng.random() < 0.4 else "read"
        tally = self.tally
        tally.accepted += 1
        try:
            stream = client.generate(job.prompt, job.params, timeout=0.05 if how == "deadline" else None)
            if how == "final":
                last = await stream.final()
            else:
                last, deltas = None, [""] * job.params.n
                async for last in stream:
                    self._token_came()
                    deltas = [text + part.delta for text, part in zip(deltas, last.outputs, strict=True)]
                    if how == "abort" and rng.random() < 0.2:
                        stream.abort()
                if last is not None and deltas != [part.text for part in last.outputs]:
                    tally.wrong.append(f"the parts of {job.prompt!r} are not its whole")
            assert last is not None
            if any(part.finish_reason == "abort" for part in last.outputs):
                tally.aborted += 1
            elif seen(last) == job.expected:
                tally.exact += 1
            else:
                tally.wrong.append(f"{job.prompt!r} {job.params}: {seen(last)} is not {job.expected}")
        except DeadlineExceeded:
            tally.expired += 1
        except TreadleError as error:
            tally.lost.append(f"{job.prompt!r}: {type(error).__name__}: {error}")

    def _token_came(self) -> None:
        if self._struck and self._recovered:
            self.tally.recovery.append(time.perf_counter() - self._struck)
            self._struck = 0.0

    _recovered = False
    _enough = False

    def _most_even(self) -> bool:
        """Every kind of fault has come so often as was asked for."""
        kinds = [*KINDS, *(["server"] if self._options.server_kills else [])]
        return min(self.tally.faults[kind] for kind in kinds) >= self._options.least

    # ── faults ──

    async def _strike_on(self) -> None:
        watcher = Client(self._place.endpoint, connect_timeout=60.0)
        await watcher.start()
        try:
            await self._settled(watcher)
            deck: list[str] = []
            while not self._stop.is_set() and not (self._enough and self._most_even()):
                if not deck:
                    deck = [*KINDS, *(["server"] if self._options.server_kills else [])]
                    self._rng.shuffle(deck)
                kind = deck.pop()
                before = (await watcher.stats()).recoveries
                self._recovered, self._struck = False, time.perf_counter()
                await self._strike(kind)
                self.tally.faults[kind] += 1
                await self._healed(watcher, before, kind)
                if not self._stop.is_set():
                    self._place.measure(self.tally)
                await self._pause(self._rng.uniform(*self._options.gap))
        finally:
            await watcher.close()

    async def _strike(self, kind: str) -> None:
        if kind == "hostile":
            await asyncio.to_thread(self._hostile)
            return
        if kind == "server":
            self.tally.server_kills += 1
            await self._place.kill()
            return
        victim = self._rng.choice(self._place.ranks())
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "spoil": signal.SIGUSR2}.get(kind, signal.SIGSTOP)
        try:
            os.kill(victim, number)
            if kind == "delay":
                await asyncio.sleep(self._rng.uniform(0.05, 0.8))
                os.kill(victim, signal.SIGCONT)
        except ProcessLookupError:
            return  # it ended by itself, of an earlier fault

    def _hostile(self) -> None:
        """A client that talks nonsense."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        raw = context.socket(zmq.DEALER)
        raw.connect(self._place.endpoint)
        raw.sndtimeo = 1_000
        try:
            for _ in range(200):
                frame = self._mutator.frame()
                if not _asks_for_the_end(frame):
                    raw.send(frame)
        except zmq.Again:
            pass
        finally:
            context.destroy(linger=200)

    async def _healed(self, watcher: Client, before: int, kind: str) -> None:
        """Waits until the fault has been dealt with, as far as it had an effect."""
        end = time.monotonic() + _EFFECT_SECONDS.get(kind, _READY_SECONDS)
        while time.monotonic() < end:
            try:
                recoveries = (await watcher.stats()).recoveries
            except TreadleError:
                await asyncio.sleep(0.1)
                continue
            spare_lost = self._options.standby and (await watcher.health()).spare == "loading"
            if recoveries != before:
                self._recovered = True
                break
            if spare_lost and (await watcher.stats()).recoveries == before:
                break  # it was the spare's rank
            await asyncio.sleep(0.005)
        await self._settled(watcher)
        if kind != "server" and not self._stop.is_set():
            self.tally.recoveries += (await watcher.stats()).recoveries - before

    async def _settled(self, watcher: Client) -> None:
        """Until the service is ready, its spare too, so that a fault never meets ranks that load."""
        end = time.monotonic() + _READY_SECONDS
        while time.monotonic() < end and self._place.process.poll() is None:
            try:
                health = await watcher.health()
                if health.state in ("ready", "stuck") and health.spare in ("", "ready"):
                    return
            except TreadleError:
                pass
            await asyncio.sleep(0.02)
        self.tally.wrong.append("the service did not become ready again, or has ended")
        self._stop.set()
        for task in self._clients:
            task.cancel()

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.wait()
        except TimeoutError:
            return


def report(tally: Tally, left: list[str], code: int, seconds: float) -> dict[str, object]:
    times = tally.recovery
    grown = 0.0 if tally.server_kills else growth(tally.memory) / 1e6
    opened = 0 if tally.server_kills else tally.descriptors[-1] - tally.descriptors[0]
    good = not tally.wrong and not tally.lost and not left and code == 0 and grown < 64.0 and opened < 8
    return {
        "good": good,
        "seconds": round(seconds, 1),
        "faults": dict(tally.faults),
        "faults_in_all": tally.faults.total(),
        "requests": tally.accepted,
        "exact": tally.exact,
        "aborted": tally.aborted,
        "expired": tally.expired,
        "wrong": tally.wrong[:20],
        "lost": tally.lost[:20],
        "recoveries": tally.recoveries,
        "recovery_median_s": round(statistics.median(times), 3) if times else None,
        "recovery_worst_s": round(max(times), 3) if times else None,
        "left": left,
        "server_exit_code": code,
        "memory_grown_mb": round(grown, 1),
        "memory_mb": [round(size / 1e6, 1) for size in tally.memory[:: max(1, len(tally.memory) // 20)]],
        "descriptors_grown": opened,
    }


def growth(samples: list[int]) -> float:
    """Bytes, from what the server held in the beginning to what it held in the end: medians, for one may be a peak."""
    part = max(1, min(_SAMPLES, len(samples) // 2))
    return statistics.median(samples[-part:]) - statistics.median(samples[:part])


def chaos(options: argparse.Namespace) -> dict[str, object]:
    """Runs it all and says what came out."""
    directory = Path(tempfile.mkdtemp(prefix="c-"))
    began = time.monotonic()
    place = Place(options, directory)
    try:
        made: list[Chaos] = []

        async def go() -> None:
            made.append(Chaos(options, place))
            await made[0].run()

        asyncio.run(go())
        code = place.end()
        result = report(made[0].tally, place.left(), code, time.monotonic() - began)
        if not result["good"]:
            result["log"] = (directory / "server.log").read_text()[-4000:]
        return result
    finally:
        place.process.kill()
        place.process.wait()
        shutil.rmtree(directory, ignore_errors=True)


def serve(options: argparse.Namespace) -> int:
    """The server's process: as `treadle serve`, with ranks that can be spoiled and deadlines that are short."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    values = service_options(
        tensor_parallel_size=options.ranks,
        dtype="float32",
        num_blocks=1000,
        max_num_seqs=16,
        step_timeout=8.0,
        step_timeout_floor=2.0,
        start_timeout=120.0,
        max_restarts=6,
        max_engine_failures=options.max_engine_failures,
        standby=options.standby,
        debug=True,
        dump_dir=os.environ["XDG_RUNTIME_DIR"],
    )
    engine = (sys.executable, str(ROOT / "scripts" / "chaos_engine.py"))
    settings = ServeSettings(options.model, options.serve, values, engine_command=engine)
    return run(settings, lambda endpoint: print(f"ready on {endpoint}", flush=True))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--jobs", type=int, default=24, help="different requests")
    parser.add_argument("--gap", type=float, nargs=2, default=(0.6, 1.8), help="seconds between faults, from and to")
    parser.add_argument("--least", type=int, default=1, help="faults of every kind, however long it takes")
    parser.add_argument("--standby", action="store_true")
    parser.add_argument("--server-kills", action="store_true", help="kill the server itself, too; clients resume")
    parser.add_argument("--max-engine-failures", type=int, default=3, help="of the server; below 3 innocents are lost")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.serve:
        return serve(options)
    result = chaos(options)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0 if result["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
