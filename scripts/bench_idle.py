"""What a server costs that has nothing to do: CPU seconds of server, ranks and gateway, with a client connected.

    python scripts/bench_idle.py --seconds 60 --json idle.json

Each process's user and system time as the kernel counts it, before and after; the target is 1% of one core for all of
the server's processes. The client sits in this process and is counted apart. Exit code 0 when the target is met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from treadle import Client, SamplingParams

_SETTLE_SECONDS = 3.0
_TARGET_PERCENT = 1.0


def role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    if "treadle.engine" in line:
        return f"rank {line.partition('--rank ')[2].split()[0]}"
    return "gateway" if " gateway " in line else "server"


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def served(options: argparse.Namespace) -> Iterator[tuple[str, psutil.Process]]:
    """The endpoint and the process of a server that is ready."""
    with tempfile.TemporaryDirectory(prefix="i-") as directory:
        endpoint = f"ipc://{directory}/s.ipc"
        command = [sys.executable, "-m", "treadle", "serve", options.model, "--endpoint", endpoint]
        command += ["--tensor-parallel-size", str(options.ranks), "--http", "127.0.0.1:0"]
        command += ["--standby"] * options.standby
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "XDG_RUNTIME_DIR": directory})
        try:
            assert process.stdout is not None
            for _ in range(2):  # the endpoint, and the gateway's address
                line = process.stdout.readline()
                if b"ready" not in line:
                    raise SystemExit(f"the server did not start: {line!r}")
            yield endpoint, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


async def measure(options: argparse.Namespace, endpoint: str, server: psutil.Process) -> dict[str, object]:
    async with Client(endpoint) as client:
        await client.generate("Once upon a time", SamplingParams(max_tokens=8)).final()
        while options.standby and (await client.health()).spare != "ready":
            await asyncio.sleep(0.1)
        await asyncio.sleep(_SETTLE_SECONDS)
        watched = [server, *server.children(recursive=True)]
        own = psutil.Process()
        names = {process.pid: role(process) for process in watched}
        before, began = {process: cpu_seconds(process) for process in [*watched, own]}, time.monotonic()
        await asyncio.sleep(options.seconds)
        seconds = time.monotonic() - began
        used = {process: cpu_seconds(process) - start for process, start in before.items()}
    client_seconds = used.pop(own)
    percent = 100 * sum(used.values()) / seconds
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": {names[process.pid]: round(value, 3) for process, value in used.items()},
        "client_cpu_seconds": round(client_seconds, 3),
        "percent_of_one_core": round(percent, 3),
        "good": percent < _TARGET_PERCENT,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--standby", action="store_true", help="with a spare group, whose ranks count too")
    parser.add_argument("--seconds", type=float, default=60.0)
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
