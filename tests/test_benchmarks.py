"""The benchmarks of the scheduler run: they lean on inner names that nothing else would miss. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.scriptkit import script
from treadle.scheduler.form import is_compiled

SCRIPTS = Path(__file__).parent.parent / "scripts"


def report(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPTS / script), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_cost_of_the_scheduler() -> None:
    found = report("bench_scheduler.py", "--only", "decode,admission", "--rows", "1,20", "--steps", "20")
    assert set(found["decode_step"]) == {"1", "20"} and found["compiled"] == is_compiled()
    assert all(found[f"admission_2048_{how}"]["ours"] > 0 for how in ("cold", "cached"))


def test_the_speed_of_the_simulator() -> None:
    """Beside itself, which simulates the same."""
    here = str(SCRIPTS.parent)
    found = report("bench_simulator.py", "--rate", "20", "--seconds", "1", "--runs", "1", "--against", here)
    assert found["same"] and found["this"]["speed"] > 0 and found["ratio"] > 0


def test_the_cost_of_being_watched() -> None:
    found = report("bench_telemetry.py", "--rows", "1,20", "--steps", "30")
    assert set(found["step"]) == {"1", "20"} and all(step["metrics"] > 0 for step in found["step"].values())
    assert min(found["request"].values()) > 0


@pytest.mark.parametrize("mode", ["embedded", "clients"])
def test_the_cost_of_delivery(mode: str) -> None:
    found = report("bench_delivery.py", mode, "--streams", "12", "--clients", "3", "--steps", "24")
    assert 0 < found["delivery"] < found["thread_per_step"]
    assert found["steps"] > 10


def test_the_cost_of_moving_blocks() -> None:
    sizes = ("--block-sizes", "16", "--blocks", "1,3", "--repeats", "1")
    found = report("bench_swap.py", "--device", "cpu", "--parts", "bandwidth", *sizes)
    assert [row["blocks"] for row in found["bandwidth"]] == [1, 3]
    assert all(row[way] > 0 for row in found["bandwidth"] for way in ("out_us_per_block", "in_us_per_block"))


def test_the_trade_off_of_a_service_level() -> None:
    """Simulated, so the figures are the same everywhere: a target holds, and somebody pays for it."""
    levels = script("bench_service_level")
    free, held = (levels.simulated(target, seconds=6.0, seed=0) for target in (None, 0.012))
    assert free.between_p99 > 0.05 and free.within is None
    assert held.between_p99 < 0.0122 and held.within == 1.0
    assert held.ttft_document_p50 > free.ttft_document_p50
    assert levels.table([free, held]).count("\n") == 3


def test_the_cost_of_being_looked_at(tmp_path: Path) -> None:
    script, out = SCRIPTS / "bench_live.py", tmp_path / "out"
    command = [sys.executable, str(script), "--rows", "3", "--blocks", "500", "--times", "5", "--json", str(out)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=120)
    [found] = json.loads(out.read_text())
    assert found["rows"] == 3 and min(found["step"], found["look"], found["start_and_end"]) > 0
