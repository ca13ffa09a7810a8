"""The compiled form: what is compiled is there, nobody's classes extend it, and it never lies beside sources.

docs/decisions/015-compiled-scheduler.md says how other tests run against it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from treadle import __version__
from treadle.commands import run
from treadle.scheduler import core
from treadle.scheduler.form import is_compiled

ROOT = Path(__file__).parent.parent


def compiled_modules() -> tuple[str, ...]:
    """As `setup.py` names them."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES":
            names: tuple[str, ...] = ast.literal_eval(node.value)
            return names
    raise AssertionError("setup.py names no modules")


def test_what_is_compiled_is_there_once() -> None:
    modules = compiled_modules()
    assert list(modules) == sorted(set(modules))
    assert [module for module in modules if not (ROOT / f"{module}.py").is_file()] == []


def test_what_would_mean_something_else_is_not_compiled() -> None:
    """A compiled class has no interpreted children; a compiled struct has lost its types and options; and what checks
    a policy's answers would get them made to fit, `True` as 1.0."""
    assert {"scheduler/policies/interface", "scheduler/policies/guard"}.isdisjoint(compiled_modules())
    for module in compiled_modules():
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            assert "msgspec.Struct" not in bases, f"{module}: {ast.unparse(node)[:60]}"


def test_it_is_not_built_beside_sources() -> None:
    """Where it would be stale after the next edit, and run all the same."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TREADLE_COMPILE": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and "TREADLE_COMPILE=1 makes wheels" in done.stderr
    assert not list(ROOT.glob("scheduler/*.so"))


def test_it_is_said_which_form_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_compiled() == (Path(core.__file__).suffix != ".py")
    with pytest.raises(SystemExit):
        run(["--version"])
    said = f"treadle {__version__}, scheduler compiled" if is_compiled() else f"treadle {__version__}"
    assert capsys.readouterr().out == f"{said}\n"
