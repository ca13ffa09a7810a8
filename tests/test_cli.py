"""The commands, as a person types them."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .servekit import serving


def treadle(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
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
        stats = json.loads(treadle("stats", *to).stdout)
        assert stats["finished"] == 4 and stats["blocks_used"] == 0
        assert json.loads(treadle("health", *to).stdout)["state"] == "ready"
        assert server.end() == 0


def test_launch_script_is_serve(tiny: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "scripts" / "launch.py"
    help_text = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert "--tensor-parallel-size" in help_text.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "x", "--model", "nowhere"), "ModelNotFound"),
        (("serve", "nowhere", "--endpoint", "tcp://127.0.0.1:5"), "CURVE"),
        (("serve", "nowhere", "--endpoint", "smoke-signals"), "allowed are"),
        (("serve", "nowhere", "--pipeline-depth", "0"), "pipeline_depth=0"),
        (("stats", "--endpoint", "ipc:///nonexistent-directory/x.ipc"), "ServerLost"),
        (("keys", "/nonexistent-directory/keys"), "No such file"),
    ],
)
def test_errors_are_one_clear_line(arguments: tuple[str, ...], says: str) -> None:
    done = treadle(*arguments)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


def test_an_empty_prompt_and_bad_flags_are_refused(tiny: Path) -> None:
    done = treadle("generate", "", "--model", str(tiny))
    assert done.returncode == 2 and "empty" in done.stderr
    assert treadle("generate", "x", "--max-tokens", "many").returncode == 2
    assert treadle("no-such-command").returncode == 2


def test_keys_are_made_once(tmp_path: Path) -> None:
    made = treadle("keys", str(tmp_path / "keys"))
    assert made.returncode == 0 and len(made.stdout.split()[-1]) == 40
    assert treadle("keys", str(tmp_path / "keys")).returncode == 2


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
    master, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, str(script), "--max-tokens", "24"], stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(master, 1 << 16):
            seen += chunk
    except OSError:
        pass  # how Linux says that the other side of a terminal is closed
    os.close(master)
    shown = seen.decode(errors="replace")
    assert process.wait(60) == 0, shown
    assert len(re.findall(r"\x1b\[\d+A", shown)) >= 5, "it was not drawn while it came"
    assert shown.count("TTFT") == 3
    assert "tokens/s over 3 streams" in shown and "prefix cache hit rate" in shown
    assert "sky" in shown
