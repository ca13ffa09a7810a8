"""The commands, as a person types them."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from treadle.asking import show
from treadle.commands import _parser
from treadle.errors import InvalidRequest, ServerLost
from treadle.exit_codes import HEALTH, exit_codes
from treadle.flags import SERVICE_HELP
from treadle.lines import Lines
from treadle.outputs import CompletionOutput, RequestOutput
from treadle.scheduler.options import ServiceOptions

from .clikit import ended
from .servekit import serving


class Typed(NamedTuple):
    code: int
    shown: str


def on_a_terminal(*arguments: str, module: bool = True, answers: Sequence[tuple[bytes, bytes]] = ()) -> Typed:
    """Runs the command as a person does. answers: what to type when the terminal has shown a text after the last."""
    child, master = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, *(("-m", "treadle") if module else ()), *arguments])
    seen, mark, left = b"", 0, list(answers)
    try:
        while chunk := os.read(master, 1 << 16):
            seen += chunk
            if left and left[0][0] in seen[mark:]:
                mark = len(seen)
                os.write(master, left.pop(0)[1])
    except OSError:
        pass  # how Linux says that the other side of a terminal is closed
    os.close(master)
    _, status = os.waitpid(child, 0)
    return Typed(os.waitstatus_to_exitcode(status), seen.decode(errors="replace"))


def treadle(*arguments: str | bytes, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "treadle", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def test_generate_embedded_and_from_standard_input(tiny: Path) -> None:
    flags = ("--model", str(tiny), "--dtype", "float32", "--max-tokens", "8", "--temperature", "0")
    direct = treadle("generate", "Hello", *flags)
    piped = treadle("generate", "-", *flags, text="Hello")
    assert direct.returncode == piped.returncode == 0, direct.stderr
    assert direct.stdout == piped.stdout != "\n"


def test_commands_against_a_server(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "server", tiny, "--max-num-seqs", "4") as server:
        to = ("--endpoint", server.endpoint)
        answer = treadle("generate", "Hello", *to, "--max-tokens", "5", "--seed", "3")
        again = treadle("generate", "Hello", *to, "--max-tokens", "5", "--seed", "3")
        assert answer.returncode == 0 and answer.stdout == again.stdout
        chat = treadle("chat", *to, "--max-tokens", "5", "--system", "Be brief.", text="Hi\n\nAnd now?\n")
        assert chat.returncode == 0, chat.stderr
        assert "> " not in chat.stdout, "no prompt where nobody types"
        typed = on_a_terminal("chat", *to, answers=[(b"> ", b"\x03")])
        assert typed.code == 130 and "Traceback" not in typed.shown, "Ctrl-C waited for a line"
        over = treadle("generate", "Hello", *to, "--model", "x", "--threads", "2")
        assert over.returncode == 2 and "--model, --threads: the server at --endpoint has its own" in over.stderr
        stats = json.loads(treadle("stats", *to).stdout)
        assert stats["finished"] == 4 and stats["blocks_used"] == 0
        assert json.loads(treadle("health", *to).stdout)["state"] == "ready"
        assert server.end() == 0


def test_launch_script_is_serve(tiny: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "launch.py"
    help_text = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert "--tensor-parallel-size" in help_text.stdout


REFUSED: list[tuple[tuple[str | bytes, ...], str]] = [
    (("generate", "x", "--model", "nowhere"), "ModelNotFound"),
    (("serve", "nowhere", "--endpoint", "tcp://127.0.0.1:5"), "CURVE"),
    (("serve", "nowhere", "--endpoint", "smoke-signals"), "allowed are"),
    (("serve", "nowhere", "--pipeline-depth", "0"), "pipeline_depth=0"),
    (("generate", "x", "--tensor-parallel-size", "99"), "at most 9 ranks"),
    (("serve", "nowhere", "--num-blocks", str(10**12)), "num_blocks=1000000000000: allowed is 0 to"),
    (("stats", "--endpoint", "ipc:///nonexistent-directory/x.ipc"), "ServerLost"),
    (("generate", "x", "--endpoint", "ipc:///nonexistent-directory/x.ipc"), "treadle serve MODEL"),
    (("generate", "x", "--server-key", "k"), "give its --endpoint"),
    (("generate", "x", "--model", "/dev/null"), "neither a file nor a directory"),
    (("generate", "x", "--model", "x" * 5000), "too long"),
    (("generate", "x", "--model", "nowhere", "--temperature", "nan"), "temperature must be"),
    (("generate", "", "--model", "nowhere"), "the prompt is empty"),
    (("generate", "-", "--model", "nowhere"), "the prompt is empty"),
    (("generate", b"caf\xe9", "--model", "nowhere"), "the prompt is not UTF-8, at character 3"),
    (("chat", "--system", b"\xff", "--model", "nowhere"), "--system is not UTF-8"),
    (("stats", "--connect-timeout", "nan"), "connect_timeout=nan"),
    (("keys", "/nonexistent-directory/keys"), "No such file"),
]


def test_errors_are_one_clear_line() -> None:
    for (arguments, says), done in zip(REFUSED, ended(*(arguments for arguments, _ in REFUSED)), strict=True):
        assert done.code == 2, arguments
        assert says in done.stderr and "Traceback" not in done.stderr, arguments


def test_bad_flags_are_refused() -> None:
    no_number, unknown, no_command = ended(
        ("generate", "x", "--max-tokens", "many"), ("generate", "x", "--bogus", "1"), ("no-such-command",)
    )
    assert no_number.code == 2
    assert unknown.code == 2 and unknown.stderr.startswith("treadle generate: unknown: --bogus 1")
    assert no_command.code == 2


def test_input_that_is_not_text_is_refused() -> None:
    command = [sys.executable, "-m", "treadle", "generate", "-"]
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, timeout=60)
    assert done.returncode == 2 and b"not UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_every_option_has_its_help() -> None:
    assert set(SERVICE_HELP) == {field.name for field in msgspec.structs.fields(ServiceOptions)}
    assert all(SERVICE_HELP.values())


def test_ctrl_c_during_the_imports_is_quiet() -> None:
    program = """
import sys

class Typed:
    def find_spec(self, name, path=None, target=None):
        if name == "treadle.commands":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Typed())
from treadle.cli import main
heavy = {"zmq", "numpy", "msgspec", "asyncio"} & set(sys.modules)
assert not heavy, heavy  # what is imported before `main` has nobody who catches
sys.exit(main(["stats"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.asyncio
async def test_lines_of_pipes_and_files(tmp_path: Path) -> None:
    async def lines(data: bytes) -> tuple[list[str], list[str]]:
        (tmp_path / "file").write_bytes(data)
        read, write = os.pipe()
        os.write(write, data)
        os.close(write)
        with open(tmp_path / "file", "rb") as file, open(read, "rb") as pipe:  # noqa: ASYNC230
            return [line async for line in Lines(file.fileno())], [line async for line in Lines(pipe.fileno())]

    for data, expected in (
        (b"", []),
        (b"one", ["one"]),
        (b"\n\none\r\ntwo", ["", "", "one", "two"]),
        ("é\n".encode() * 20_000, ["é"] * 20_000),  # as much as a pipe holds
    ):
        assert await lines(data) == (expected, expected)
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        await lines(b"caf\xe9\n")


@pytest.mark.asyncio
async def test_waiting_for_a_line_can_be_cancelled() -> None:
    read, write = os.pipe()
    task = asyncio.create_task(anext(Lines(read)))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    os.close(read)
    os.close(write)


@pytest.mark.asyncio
@pytest.mark.parametrize(("texts", "shown"), [(("Once", " upon"), "Once upon\n"), ((), "")])
async def test_what_is_said_of_a_stream_that_fails_begins_a_line(
    texts: tuple[str, ...], shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def stream() -> AsyncIterator[RequestOutput]:
        for end, delta in enumerate(texts, 1):
            completion = CompletionOutput(0, text="".join(texts[:end]), delta=delta)
            yield RequestOutput("a", None, [], [completion], finished=False)
        raise ServerLost("it has ended")

    with pytest.raises(ServerLost):
        await show(stream())
    assert capsys.readouterr().out == shown


def test_keys_are_made_once(tmp_path: Path) -> None:
    made = treadle("keys", str(tmp_path / "keys"))
    assert made.returncode == 0 and len(made.stdout.split()[-1]) == 40
    assert treadle("keys", str(tmp_path / "keys")).returncode == 2  # as a process, for its exit code


def test_random_weights_say_so_loudly(tiny: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_bytes((tiny / "config.json").read_bytes())
    with serving(tmp_path / "server", shape, "--random-weights") as server:
        assert "RANDOM WEIGHTS" in server.log.read_text()
        refused = treadle("generate", "text", "--endpoint", server.endpoint)
        assert refused.returncode == 2 and "tokenizer" in refused.stderr


def test_the_demo_streams_real_text() -> None:
    """On a terminal, as a person sees it: three answers beside each other, then the figures."""
    script = Path(__file__).parent.parent / "scripts" / "demo.py"
    code, shown = on_a_terminal(str(script), "--max-tokens", "24", module=False)
    assert code == 0, shown
    assert len(re.findall(r"\x1b\[\d+A", shown)) >= 5, "it was not drawn while it came"
    assert shown.count("TTFT") == 3
    assert "tokens/s over 3 streams" in shown and "prefix cache hit rate" in shown
    assert "sky" in shown


def test_every_help_names_exit_codes_and_those_of_health_are_the_ones_in_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "survival.md").read_text()
    listed = re.findall(r"^\| (`[a-z`, ]+`|) ?\| (\d) \| ", page, re.MULTILINE)
    documented = {state: int(code) for names, code in listed for state in re.findall(r"\w+", names)}
    assert documented == HEALTH and ("", "2") in listed
    told = exit_codes("health")
    for state, code in HEALTH.items():
        assert re.search(rf"\b{code} [a-z ]*\b{state}\b", told), told
    assert "2 nobody answers" in told
    [found] = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for name, parser in found.choices.items():
        assert name == "bench" or parser.epilog == exit_codes(name)
