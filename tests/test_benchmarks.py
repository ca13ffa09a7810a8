"""The benchmarks of the scheduler run: they lean on inner names that nothing else would miss. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


def report(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPTS / script), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_cost_of_the_scheduler() -> None:
    found = report("bench_scheduler.py", "--only", "decode,admission", "--rows", "1,20", "--steps", "20")
    assert set(found["decode_step"]) == {"1", "20"}
    assert all(found[f"admission_2048_{how}"]["ours"] > 0 for how in ("cold", "cached"))


@pytest.mark.parametrize("mode", ["embedded", "clients"])
def test_the_cost_of_delivery(mode: str) -> None:
    found = report("bench_delivery.py", mode, "--streams", "12", "--clients", "3", "--steps", "24")
    assert 0 < found["delivery"] < found["thread_per_step"]
    assert found["steps"] > 10


def test_the_cost_of_being_watched(tmp_path: Path) -> None:
    script, out = SCRIPTS / "bench_live.py", tmp_path / "out"
    command = [sys.executable, str(script), "--rows", "3", "--blocks", "500", "--times", "5", "--json", str(out)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=120)
    [found] = json.loads(out.read_text())
    assert found["rows"] == 3 and min(found["step"], found["look"], found["start_and_end"]) > 0
