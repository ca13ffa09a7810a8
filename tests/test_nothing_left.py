"""However a program ends, no engine process and no file of ours remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from .conftest import alive, eventually
from .servekit import serving

PROGRAM = """
import asyncio, os, sys
from treadle import LLM, SamplingParams

async def main():
    async with LLM({model!r}, tensor_parallel_size={ranks}, in_process={in_process}) as llm:
        stream = llm.generate("a", SamplingParams(temperature=1.0, seed=1, max_tokens=200, ignore_eos=True))
        await anext(stream)
        print("running", flush=True)
        if {how!r} == "exit":
            return
        if {how!r} == "exception":
            raise RuntimeError("the program's own")
        if {how!r} == "sys.exit":
            sys.exit(5)
        await asyncio.sleep(60)

asyncio.run(main())
"""
WITHOUT_CLOSING = """
import asyncio, os, sys
from treadle import LLM, SamplingParams

async def main():
    llm = LLM({model!r}, tensor_parallel_size=2)
    await llm.start()
    await anext(llm.generate("a", SamplingParams(max_tokens=200, ignore_eos=True)))
    print("running", flush=True)

asyncio.run(main())
"""


def start(program: str, runtime: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """Runs a program until it says that its engines run; returns it with all its descendants."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"running\n"
    assert list(runtime.glob("treadle-*/*.ipc")), "its sockets are elsewhere, and nobody would see them left"
    descendants = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    return process, descendants


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("exit", 0),
        ("exception", 1),
        ("sys.exit", 5),
        (signal.SIGINT, 1),
        (signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGKILL, -signal.SIGKILL),
    ],
)
def test_nothing_is_left(tiny: Path, runtime: Path, how: str | signal.Signals, code: int, in_process: bool) -> None:
    named, ranks = how if isinstance(how, str) else "wait", 2 if in_process else 1
    process, children = start(PROGRAM.format(model=str(tiny), how=named, ranks=ranks, in_process=in_process), runtime)
    assert isinstance(how, str) or alive(children)
    if isinstance(how, signal.Signals):
        process.send_signal(how)
    exit_code = process.wait(60)
    assert exit_code in (code, -signal.SIGINT) if how == signal.SIGINT else exit_code == code
    eventually(lambda: not alive(children), "the engine processes end")
    eventually(lambda: not list(runtime.iterdir()), f"no file is left, not {list(runtime.rglob('*'))}")


def test_a_program_that_never_closes_leaves_nothing(tiny: Path, runtime: Path) -> None:
    process, children = start(WITHOUT_CLOSING.format(model=str(tiny)), runtime)
    assert process.wait(60) == 0
    eventually(lambda: not alive(children), "the engine processes end")
    eventually(lambda: not list(runtime.iterdir()), "no file is left")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_server_leaves_nothing(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path / "server", tiny, "--tensor-parallel-size", "2", endpoint="default") as server:
        ranks = server.ranks
        assert len(ranks) == 2 and server.endpoint.removeprefix("ipc://") in server.files
        server.process.send_signal(number)
        assert server.process.wait(30) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        eventually(lambda: not alive(ranks), "the engine processes end")
        eventually(lambda: not server.files, f"no file is left, not {server.files}")
        if number != signal.SIGKILL:
            assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 0)])
def test_a_server_that_is_ended_while_it_starts(tiny: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "treadle", "serve", str(tiny), "--endpoint", f"ipc://{tmp_path}/run/s.ipc"]
    (tmp_path / "run").mkdir(mode=0o700)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        eventually(lambda: psutil.Process(process.pid).children(), "an engine process starts")
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, said) == (code, "")
    assert not list((tmp_path / "run").iterdir())


def test_a_stopped_rank_is_no_way_to_stay(tiny: Path, tmp_path: Path) -> None:
    """SIGSTOP makes a process deaf to everything but SIGKILL; closing must still end it."""
    with serving(tmp_path / "server", tiny, "--tensor-parallel-size", "2", "--stop-timeout", "0.5") as server:
        ranks = server.ranks
        os.kill(ranks[1], signal.SIGSTOP)
        server.process.terminate()
        assert server.process.wait(30) == 0
        eventually(lambda: not alive(ranks), "the engine processes end")
        eventually(lambda: not server.files, "no file is left")
