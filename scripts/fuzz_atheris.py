"""Coverage-guided fuzzing (atheris, libFuzzer) of every decoder and of the socket that clients connect to.

    pip install 'treadle[fuzz]'
    python scripts/fuzz_atheris.py --frames 500000 --socket-frames 100000 --json atheris.json

Two targets, each in a process of its own, with our modules instrumented. `decoders`: a frame goes into every decoder,
and what is a request through the checks into a scheduler core. `socket`: a frame goes through a real socket to a
service over ranks without a model, and a Ping behind it, whose answer ends the run of that frame. Any exception that is
not a typed refusal ends the target; in the end the core's invariants must hold, nothing may be left in it, and the
service must give the right tokens. Half of the mutations are libFuzzer's, half exchange a value inside a well-formed
frame, for msgspec's decoder is compiled and gives no coverage of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

_MOST_BYTES = 4_096
_CLIENT_FRAMES = 2_000
_WARM = 10
_DEFAULT_SEED = 1
_STEP_SECONDS = 120.0
_ARRAYS = (
    "kvcache.block_pool",
    "scheduler.invariants",
    "scheduler.planner",
    "scheduler.reservation",
    "scheduler.results",
    "scheduler.rows",
    "scheduler.running",
)
"""What compares arrays in every step, far behind anything that decodes. atheris 3.0 keeps the result of a comparison
that it watches, some 200 bytes for ever, so that memory would seem to leak."""


def decoders(frames: int, report: Path, corpus: Path) -> None:
    """Never returns."""
    from scripts.fuzz_frames import Decoders

    target, memory = Decoders(), [0]
    began = time.perf_counter()

    def take(frame: bytes) -> None:
        target.take(frame)
        if target.frames == frames // _WARM:
            memory[0] = _rss()
        if target.frames == frames:
            target.finish()
            grown = _rss() - memory[0]
            _end(report, frames, began, grown, {"outcomes": dict(target.outcomes)})

    _fuzz(take, corpus)


def frontend(frames: int, report: Path, corpus: Path) -> None:
    """Never returns. libFuzzer must have the main thread, so service and client have a loop on another."""
    from treadle.loop_thread import LoopThread

    home = LoopThread("frontend")
    talk = home.run(_opened(frames, report))
    _fuzz(lambda frame: home.run(talk.take(frame)), corpus)


async def _opened(frames: int, report: Path) -> Frontend:
    frontend = Frontend(frames, report)
    await frontend.open()
    return frontend


class Frontend:
    """A service over ranks without a model, and one client after the other that says frames to it."""

    def __init__(self, frames: int, report: Path) -> None:
        from tests.faultkit import Faulty

        self._frames = frames
        self._report = report
        self._directory = Path(tempfile.mkdtemp(prefix="a-"))
        self._endpoint = f"ipc://{self._directory}/s.ipc"
        # A slow machine must not be taken for a disturbed service.
        self._faulty = Faulty(self._directory, [], 0.0, {"max_num_seqs": 64, "step_timeout": _STEP_SECONDS})
        self._taken = 0
        self._memory = 0
        self._began = time.perf_counter()

    async def open(self) -> None:
        from scripts.fuzz_frames import Talker
        from treadle.scheduler.client_limits import ClientLimits
        from treadle.scheduler.client_server import ClientServer

        await self._faulty.service.start()
        limits = ClientLimits(messages_per_second=1e6)
        self._server = ClientServer(self._faulty.service, self._endpoint, limits=limits)
        self._talker = Talker(self._endpoint)

    async def take(self, frame: bytes) -> None:
        await self._talker.say(frame)
        self._taken += 1
        if self._taken % _CLIENT_FRAMES == 0:
            await self._next_client()
        if self._taken == max(_CLIENT_FRAMES, self._frames // _WARM):
            self._memory = _rss()
        if self._taken == self._frames:
            await self._finish()

    async def _next_client(self) -> None:
        from scripts.fuzz_frames import Talker

        self._talker.close()
        for session in list(self._server._sessions.values()):
            self._server.drop(session, "has said enough")
        self._talker = Talker(self._endpoint)

    async def _finish(self) -> None:
        """Never returns. What was said must have changed nothing."""
        await self._next_client()
        grown, service = _rss() - self._memory, self._faulty.service
        self._faulty.submit_all()
        await self._faulty.all_ended()
        stats, health, exact = service.stats(), service.health(), self._faulty.exact()
        self._server.close()
        await service.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        if health.state != "ready" or self._faulty.events or not exact or stats.blocks_used:
            print(f"the service was disturbed: {health} {stats} {self._faulty.events}", flush=True)
            os._exit(1)
        _end(self._report, self._taken, self._began, grown, {"bad_frames": stats.bad_frames})


def _rss() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _end(report: Path, frames: int, began: float, grown: int, more: dict[str, Any]) -> None:
    seconds = round(time.perf_counter() - began, 1)
    report.write_text(
        json.dumps({"frames": frames, "seconds": seconds, "memory_grown_mb": round(grown / 1e6, 1)} | more)
    )
    os._exit(0)


def _fuzz(take: Callable[[bytes], None], corpus: Path) -> None:
    import atheris

    from scripts.fuzz_frames import Mutator, seeds

    for number, frame in enumerate(seeds()):
        (corpus / str(number)).write_bytes(frame)
    mutator = Mutator(_DEFAULT_SEED)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        if seed % 2:
            return bytes(atheris.Mutate(data, most))
        changed = bytearray(data)
        mutator.exchange(changed)
        return bytes(changed[:most])

    flags = [
        f"-max_len={_MOST_BYTES}",
        f"-seed={_DEFAULT_SEED}",
        "-timeout=300",
        "-print_final_stats=0",
        "-verbosity=1",
    ]
    flags.append(f"-artifact_prefix={corpus.parent}/")
    atheris.Setup([sys.argv[0], *flags, str(corpus)], take, custom_mutator=mutate)
    atheris.Fuzz()


def child(options: argparse.Namespace) -> None:
    """One target, instrumented before anything of ours is imported."""
    import atheris

    with atheris.instrument_imports(include=["treadle"], exclude=[f"treadle.{name}" for name in _ARRAYS]):
        import treadle.scheduler.client_server
        import treadle.scheduler.service  # noqa: F401
    work = decoders if options.child == "decoders" else frontend
    work(options.frames, options.report, options.corpus)


def parent(options: argparse.Namespace) -> int:
    result: dict[str, object] = {}
    for target, frames in (("decoders", options.frames), ("socket", options.socket_frames)):
        if not frames:
            continue
        with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
            report, corpus, log = Path(made, "report"), Path(made, "corpus"), Path(made, "log")
            corpus.mkdir()
            command = [sys.executable, __file__, "--child", target, "--frames", str(frames)]
            with log.open("wb") as file:
                done = subprocess.run(
                    [*command, "--report", str(report), "--corpus", str(corpus)], stdout=file, stderr=file
                )
            lines = log.read_text(errors="replace").splitlines()
            if not report.exists():
                print("\n".join(lines[-60:]), file=sys.stderr)
                return done.returncode or 1
            covered = [line for line in lines if "cov:" in line][-1:]
            result[target] = json.loads(report.read_text()) | {
                "corpus": len(list(corpus.iterdir())),
                "libfuzzer": " ".join(covered),
            }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000, help="to the decoders (default %(default)s)")
    parser.add_argument("--socket-frames", type=int, default=20_000, help="to the service (default %(default)s)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("decoders", "socket"), help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return 1  # libFuzzer gave up; a target that has had its frames ends the process itself
    return parent(options)


if __name__ == "__main__":
    sys.exit(main())
