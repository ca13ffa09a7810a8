"""`scripts/setup.sh` with a pip that fails: it says what was short, and does not blame the network for everything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
# A Python that fits, whose environments have a pip that says and does what the test wants.
case "$1$2" in
-c*sysconfig*) mkdir -p .venv/site && echo .venv/site ;;
-c*) exit 0 ;;
--version) echo "Python 3.99.0" ;;
-mvenv) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
-mpip) printf '%s\\n' "$PIP_SAYS"; exit "$PIP_CODE" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a fresh clone has of it, and a Python of our own."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def set_up(clone: Path, says: str = "", code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"TREADLE_PYTHON": str(clone / "python"), "PIP_SAYS": says, "PIP_CODE": str(code)} | environment
    script = f"set -euo pipefail; . {clone}/scripts/setup.sh test; echo done"
    return subprocess.run(
        ["bash", "-c", script], env={**os.environ, **variables}, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("says", "code", "short"),
    [
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError(… Failed to establish …')\n"
            "ERROR: No matching distribution found for torch<2.14",
            1,
            "index cannot be reached",
        ),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 1, "disk is full"),
        ("ERROR: Package 'treadle' requires a different Python: 3.9 not in '>=3.11'", 1, "another version of Python"),
        ("ERROR: No matching distribution found for torch<2.14", 1, "no such package for Python 3.99.0"),
        ("ERROR: Could not install: [Errno 13] Permission denied: '/x'", 1, "may not be written"),
        ("Collecting torch", 137, "too little memory"),
        ("error: something else", 1, "said why above"),
    ],
)
def test_what_was_short_is_said(clone: Path, says: str, code: int, short: str) -> None:
    done = set_up(clone, says, code)
    assert done.returncode == 1 and "done" not in done.stdout
    assert short in done.stderr.splitlines()[-1]
    assert ("offline" in done.stderr) == (short == "index cannot be reached")
    assert says.splitlines()[-1] in done.stderr, "pip's own last words"
    assert set_up(clone).returncode == 0, "it can be run again"


def test_an_interrupted_pip_is_no_failure_to_explain(clone: Path) -> None:
    done = set_up(clone, "ERROR: Operation cancelled by user", 130)
    assert done.returncode == 130
    assert "failed" not in done.stderr


def test_it_is_done_once(clone: Path) -> None:
    assert set_up(clone).stdout == "done\n"
    again = set_up(clone, "it must not run again", 1)
    assert (again.returncode, again.stderr) == (0, "")
    (clone / "pyproject.toml").write_text("# changed")
    assert set_up(clone, "now it runs", 1).returncode == 1


def test_a_clone_named_like_the_package_is_found_and_never_written_through(tmp_path: Path, clone: Path) -> None:
    """From beside it, too; and a plain `pip install .` has a place of its own to write to."""
    here = tmp_path / "beside" / "treadle"
    shutil.copytree(clone, here, ignore=shutil.ignore_patterns("beside"))
    (here / "treadle").mkdir()
    (here / "treadle" / "__init__.py").touch()
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").touch()
    made = f"-mvenv) exec {sys.executable} -m venv --without-pip .venv"
    (here / "python").write_text(re.sub("-mvenv.*python", made, PYTHON))

    def found() -> Path:
        python = [here / ".venv" / "bin" / "python", "-c", "import treadle; print(treadle.__file__)"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(python, cwd=here.parent, env=environment, capture_output=True, text=True, timeout=60)
        return Path(done.stdout.strip()).parent

    assert set_up(here, PYTHONPATH=str(tmp_path)).stdout == "done\n"
    assert found().resolve() == here / "treadle"
    (site,) = (here / ".venv" / "lib").glob("python3*/site-packages")
    (site / "treadle").symlink_to(here / "treadle")  # as earlier versions of this script left it
    (here / "pyproject.toml").write_text("# changed")
    assert set_up(here, PYTHONPATH=str(tmp_path)).stdout == "done\n"
    assert not (site / "treadle").exists() and found().resolve() == here / "treadle"
    (site / "treadle").mkdir()
    (site / "treadle" / "__init__.py").touch()
    assert found() == site / "treadle"


def test_a_python_that_was_asked_for_is_not_replaced(clone: Path) -> None:
    done = set_up(clone, TREADLE_PYTHON="/bin/false")
    assert done.returncode == 1
    assert "TREADLE_PYTHON is /bin/false" in done.stderr
