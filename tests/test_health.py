"""Health is progress; who is stuck is named, and the dump says what everybody was doing."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from treadle import Client, SamplingParams
from treadle.errors import ConfigError, EventLogError, PromptTooLong, TreadleError
from treadle.scheduler.watchdog import dump_directory, write_dump

from .conftest import eventually
from .faultkit import Faulty, faulty
from .servekit import Server, serving

SECRET = "the moon is made of xyz"


async def state_is(f: Faulty, state: str) -> None:
    async with asyncio.timeout(30):
        while f.service.health().state != state:
            await asyncio.sleep(0.01)


@pytest.mark.asyncio
async def test_a_stuck_step_is_named_dumped_and_forgiven_when_it_goes_on(tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    async with faulty(tmp_path, "1 10 stop", step_timeout=8.0, step_timeout_floor=8.0, dump_dir=str(dumps)) as f:
        stopped = f.service.engine_pids[1]
        f.submit_all()
        await state_is(f, "stuck")
        health = f.service.health()
        assert (health.rank, health.seconds > 3.9) == (1, True)
        assert health.at_step >= 8 and "computing" in health.doing
        assert health.detail == "ranks [1] have not answered"
        async with asyncio.timeout(30):
            while not list(dumps.glob("dump-*.txt")):
                await asyncio.sleep(0.01)
        os.kill(stopped, signal.SIGCONT)
        await f.all_ended()
        assert f.service.health().state == "ready" and not f.events
        assert f.exact()
    (path,) = dumps.glob("dump-*.txt")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    text = path.read_text()
    assert f"stuck at step {health.at_step}" in text
    assert f"rank 1, process {stopped}: state T (stopped)" in text and "it shows no stacks" in text
    assert "rogue_engine.py" in text, "the stacks of rank 0"
    assert "thread MainThread" in text and "answers.py" in text
    assert "running: 4 rows" in text and "test/0[0], prompt 3" in text
    assert "steps\nstep " in text and "took" in text and "answered by ranks [0]" in text


@pytest.mark.asyncio
async def test_a_lost_group_is_degraded_health_with_its_progress(tmp_path: Path) -> None:
    async with faulty(tmp_path, "1 10 exit", pace=0.005) as f:
        f.submit_all()
        await state_is(f, "degraded")
        health = f.service.health()
        assert (health.rank, health.cause) == (1, "exit")
        assert "computing" in health.doing and "exit code 7" in health.detail
        async with asyncio.timeout(20):
            while f.service.health().progress != "loading":
                await asyncio.sleep(0.001)
        assert f.service.health().attempt == 1
        await f.all_ended()
        assert f.service.health().state == "ready"


def ask(server: Server) -> tuple[int, str]:
    command = [sys.executable, "-m", "treadle", "health", "--endpoint", server.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


async def dumped_while_it_runs(server: Server, dumps: Path, prompt: str) -> None:
    async with Client(server.endpoint) as client:
        with pytest.raises(PromptTooLong):
            await client.generate(prompt * 100).final()
        stream = client.generate(prompt, SamplingParams(max_tokens=200, temperature=0.987654, ignore_eos=True))
        await anext(stream)
        server.process.send_signal(signal.SIGUSR1)
        await asyncio.to_thread(eventually, lambda: bool(list(dumps.glob("dump-*.txt"))), "the dump")
        await stream.aclose()


def test_the_command_says_it_by_exit_code(tiny: Path, tmp_path: Path) -> None:
    model, away = tmp_path / "model", tmp_path / "away"
    model.symlink_to(tiny)
    dumps = tmp_path / "dumps"
    arguments = ["--dtype", "float32", "--max-restarts", "9", "--dump-dir", str(dumps)]
    with serving(tmp_path / "server", model, *arguments) as server:
        assert ask(server)[0] == 0
        asyncio.run(dumped_while_it_runs(server, dumps, SECRET))
        eventually(lambda: "engine/worker.py" in next(dumps.glob("*")).read_text(), "with the stacks of the rank")
        eventually(lambda: f"SIGUSR1: dump in {dumps}" in server.log.read_text(), "the path is in the log")
        model.rename(away)
        os.kill(server.ranks[0], signal.SIGKILL)
        eventually(lambda: "lost" in server.log.read_text(), "the loss")
        code, said = ask(server)
        assert code == 3 and '"state": "degraded"' in said and '"cause": "exit"' in said
        away.rename(model)
        eventually(lambda: ask(server)[0] == 0, "it is ready again", 40.0)
        written = [server.log, *dumps.iterdir(), *server.runtime.rglob("*.log"), *server.runtime.rglob("*.stacks")]
        texts = [path.read_text(errors="replace") for path in written]
        assert server.end() == 0
    assert len(texts) > 3 and "prompt 23, known" in "".join(texts), "it was there, and in the dump as a number"
    for forbidden in (SECRET, str(list(SECRET.encode()))[1:-1], "0.987654"):
        assert not any(forbidden in text for text in texts)
    code, said = ask(server)
    assert code == 2 and "ServerLost" in said


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("option", "place", "said"),
    [
        ("dump_dir", "file", "file': it is there and is no directory"),
        ("dump_dir", "pipe", "pipe': it is there and is no directory"),
        ("dump_dir", "file/in", "file/in': it cannot be written: Not a directory"),
        ("journal", "file/in", "file/in': [^']*/file is no directory"),
        ("journal", "d", "d': it is no regular file"),
        ("event_log", "file/in", "file/in': Not a directory"),
    ],
)
async def test_what_cannot_be_written_later_is_said_before_engines_start(
    tmp_path: Path, option: str, place: str, said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "pipe")
    f = Faulty(tmp_path, [], 0.0, {option: str(tmp_path / place)})
    with pytest.raises(ConfigError, match=f"{option}='{tmp_path}/{said}"):
        await f.service.start()
    assert f.service._standing.supervisor is None and not list((tmp_path / "d").iterdir())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("option", "error", "words"),
    [("journal", ConfigError, "no journal of this version"), ("event_log", EventLogError, "not an event log")],
)
async def test_a_file_of_somebody_else_is_refused_before_engines_start(
    tmp_path: Path, option: str, error: type[TreadleError], words: str
) -> None:
    (tmp_path / "novel").write_text("It was a dark and stormy night")
    f = Faulty(tmp_path, [], 0.0, {option: str(tmp_path / "novel")})
    with pytest.raises(error, match=words):
        await f.service.start()
    assert f.service._standing.supervisor is None
    assert (tmp_path / "novel").read_text() == "It was a dark and stormy night"
    assert [name for name in os.listdir(tmp_path) if "novel" in name] == ["novel"]


def test_dumps_are_few_and_go_where_state_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        write_dump(tmp_path / "d", f"number {number}", [("a section", ["a line"])])
    kept = list((tmp_path / "d").iterdir())
    assert len(kept) == 8
    (tmp_path / "d" / "dump-gone.txt").symlink_to(tmp_path / "nothing")  # as one that vanishes before it is looked at
    assert write_dump(tmp_path / "d", "among others", []).exists()
    assert len(list((tmp_path / "d").iterdir())) == 9
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert dump_directory("") == tmp_path / "state" / "treadle"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert dump_directory("") == Path.home() / ".local" / "state" / "treadle"
    assert dump_directory("/chosen") == Path("/chosen")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="dump_dir"):
        write_dump(tmp_path / "file", "no directory", [])
