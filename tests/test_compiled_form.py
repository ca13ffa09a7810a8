"""The compiled form, built as an installation builds it, is held to the same tests and to the same results.

docs/decisions/015-compiled-scheduler.md. What it must not contain is in `test_compiled.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MYPYC = """
import pathlib
pathlib.Path({marker!r}).touch()
def mypycify(*sources, **options):
    {does}
"""
"""A compiler of Python to C that says and does what the test wants."""
PYTHON = """#!/bin/sh
case "$1$2" in
-VV) echo "Python 3.99.0" ;;
-mpip) [ "$TREADLE_COMPILE" = 1 ] && echo made >>"$LOG" && while [ "$1" != --target ]; do shift; done && mkdir "$2" ;;
*) echo "$PYTHONPATH|$PYTHONSAFEPATH|$PWD" ;;
esac
"""
SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
SUITE = (
    "test_admission.py",
    "test_block_pool.py",
    "test_codec.py",
    "test_core_examples.py",
    "test_core_machine.py",
    "test_following.py",
    "test_host_tier.py",
    "test_policies.py",
    "test_prefix_cache.py",
    "test_replay.py",
    "test_service_level.py",
    "test_simulation.py",
    "test_swapping.py",
)
"""What runs through the compiled modules, and nearly nothing else."""


def build(into: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py` in this checkout, as pip calls it in the end."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TREADLE_COMPILE", "CC")}
    made = [sys.executable, "setup.py", "build", "--build-base", str(into), *command]
    done = subprocess.run(made, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)
    if environment.get("CC") is None and ("no C compiler" in done.stderr or "no headers installed" in done.stderr):
        pytest.skip("no C compiler here, or nothing for it to compile with")
    return done


def extensions(under: Path) -> list[Path]:
    return list(under.rglob(f"*{SUFFIX}"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which it is installed, by default: nobody has asked for it."""
    base = tmp_path_factory.mktemp("compiled")
    done = build(base)
    assert done.returncode == 0, done.stderr[-2_000:]
    (lib,) = base.glob("lib*")
    return lib


def in_form(compiled: Path | None, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A Python that finds this form of the package."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = inherited | {"PYTHONPATH": str(compiled or ROOT)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_installation_is_compiled_by_default(compiled: Path, tmp_path: Path) -> None:
    assert in_form(compiled, "-m", "treadle", "--version", cwd=tmp_path).stdout.endswith("scheduler compiled\n")
    assert (compiled / "treadle" / "scheduler" / "core.py").is_file(), "tracebacks show the sources"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_events_and_the_same_simulation_in_both_forms(compiled: Path, tmp_path: Path) -> None:
    soak = (str(ROOT / "scripts" / "soak_core.py"), "--events", "15000", "--seed", "7", "--json")
    trace = tmp_path / "lengths.jsonl"
    trace.write_text("[300, 40]\n[20, 90]\n[1500, 8]\n")
    process = ("--rate", "60", "--seconds", "5", "--policy", "fair")
    simulate = ("-m", "treadle", "simulate", "--lengths", str(trace), *process)
    said = []
    for form in (compiled, None):
        events = in_form(form, *soak, cwd=tmp_path)
        report = tmp_path / "report.json"
        simulated = in_form(form, *simulate, "--json", str(report), cwd=tmp_path)
        assert events.returncode == simulated.returncode == 0, events.stderr + simulated.stderr
        said.append((json.loads(events.stdout), json.loads(report.read_text())))
    assert said[0] == said[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_suite_of_the_core_holds_for_it(compiled: Path, tmp_path: Path) -> None:
    """From a copy that has no package of its own, which would be found first."""
    for name in ("tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    files = [f"tests/{name}" for name in SUITE]
    done = in_form(compiled, "-m", "pytest", "-q", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4_000:]
    which = in_form(compiled, "-c", "import treadle.scheduler.core as core; print(core.__file__)", cwd=tmp_path)
    assert which.stdout.strip().endswith(SUFFIX)


def test_without_a_compiler_it_is_installed_as_python(tmp_path: Path) -> None:
    done = build(tmp_path, CC="no-such-compiler")
    assert done.returncode == 0 and "as Python, for there is no C compiler (no-such-compiler)" in done.stderr
    assert list(tmp_path.rglob("core.py")) and not extensions(tmp_path)


def stand_in(directory: Path, does: str) -> Path:
    """Puts it there; the file that tells that it was asked for."""
    (directory / "mypyc").mkdir()
    (directory / "mypyc" / "__init__.py").touch()
    marker = directory / "asked"
    (directory / "mypyc" / "build.py").write_text(MYPYC.format(marker=str(marker), does=does))
    return marker


def library(base: Path) -> Path:
    """Where a build puts what it makes, if it makes more than Python."""
    return base / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


@pytest.mark.parametrize("does", ["raise RuntimeError('of another world')", "raise SystemExit('of another world')"])
def test_what_does_not_compile_is_installed_as_python_and_leaves_nothing(tmp_path: Path, does: str) -> None:
    """Nothing that was made before it failed."""
    lib = library(tmp_path / "made")
    stand_in(tmp_path, f"open({str(lib / f'half{SUFFIX}')!r}, 'w').close(); {does}")
    done = build(tmp_path / "made", "bdist_wheel", "--dist-dir", str(tmp_path), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "as Python, for it could not be compiled (" in done.stderr and "of another world)" in done.stderr
    assert (lib / "treadle" / "scheduler" / "core.py").is_file() and not extensions(tmp_path)
    assert [path.name for path in tmp_path.glob("*.whl")] == ["treadle-0.1.0-py3-none-any.whl"]


def test_what_another_build_has_made_does_not_stay(tmp_path: Path) -> None:
    """Such as a module that is not compiled any more. The compiler may be named with its options."""
    marker = stand_in(tmp_path, "return []")
    stale = library(tmp_path / "made") / "treadle" / f"gone{SUFFIX}"
    stale.parent.mkdir(parents=True)
    stale.touch()
    compiler = f"{str(sysconfig.get_config_var('CC')).split()[0]} -pipe"
    done = build(tmp_path / "made", PYTHONPATH=str(tmp_path), CC=compiler)
    assert done.returncode == 0 and marker.exists() and not extensions(tmp_path), done.stderr


def test_who_insists_is_told_of_a_failure(tmp_path: Path) -> None:
    stand_in(tmp_path, "raise RuntimeError('of another world')")
    done = build(tmp_path / "made", PYTHONPATH=str(tmp_path), TREADLE_COMPILE="1")
    assert done.returncode != 0 and "of another world" in done.stderr


def test_who_insists_is_told_at_once_that_there_is_no_compiler(tmp_path: Path) -> None:
    done = build(tmp_path, CC="no-such-compiler", TREADLE_COMPILE="1")
    assert done.returncode == 1 and "TREADLE_COMPILE=1, and there is no C compiler (no-such-compiler)" in done.stderr


def test_it_can_be_left_out(tmp_path: Path) -> None:
    done = build(tmp_path, TREADLE_COMPILE="0")
    assert done.returncode == 0 and list(tmp_path.rglob("core.py")) and not extensions(tmp_path)


def test_any_other_wish_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, TREADLE_COMPILE="yes")
    assert done.returncode == 1 and "TREADLE_COMPILE is 'yes'; it may be 1 (compile, or fail), 0" in done.stderr


@pytest.mark.parametrize("how", ["build_ext --inplace --build-temp", "editable_wheel --dist-dir"])
def test_beside_sources_nothing_is_compiled(tmp_path: Path, how: str) -> None:
    """By default; who asks for it there is told why not (`test_compiled.py`)."""
    marker = stand_in(tmp_path, "return []")
    inherited = {name: value for name, value in os.environ.items() if name != "TREADLE_COMPILE"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *how.split(), str(tmp_path)],
        cwd=ROOT,
        env=inherited | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not marker.exists() and not list(ROOT.glob("*/*.so"))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `scripts/compiled` needs of one."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "compiled", tmp_path / "scripts")
    (tmp_path / "treadle").mkdir()
    for name in ("treadle/a file.py", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (tmp_path / name).touch()
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def in_checkout(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [checkout / "scripts" / "compiled", *command],
        cwd=checkout / "scripts",
        env=inherited | {"LOG": str(checkout / "log")},
        capture_output=True,
        text=True,
    )


def test_the_script_compiles_once_for_each_state_of_the_sources(checkout: Path) -> None:
    places = set()
    for state in range(5):
        (checkout / "treadle" / "a file.py").write_text(f"{state}\n")
        for _ in range(2):
            done = in_checkout(checkout, "python", "script.py")
            path, safe, where = done.stdout.strip().split("|")
            assert done.returncode == 0 and Path(path).is_dir() and not safe, done.stderr
            assert Path(where) == checkout / "scripts", "where it was called"
            places.add(path)
    assert (checkout / "log").read_text() == "made\n" * 5 and len(places) == 5
    assert len(list((checkout / ".venv" / "compiled").iterdir())) == 3
    assert not list((checkout / ".venv").glob("compile-*"))


def test_the_script_keeps_python_from_finding_the_checkout(checkout: Path) -> None:
    assert in_checkout(checkout, "python", "-m", "treadle").stdout.split("|")[1] == "1"


def test_the_script_without_a_command_says_how_it_is_used(checkout: Path) -> None:
    done = in_checkout(checkout)
    assert done.returncode == 2 and "usage: scripts/compiled COMMAND" in done.stderr
