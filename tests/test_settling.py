"""A server that is ready has taken what stays out of Python's search for cycles."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

from treadle.scheduler.options import service_options
from treadle.serve import ServeSettings, run

from .scriptkit import script


def test_a_server_settles_before_it_says_that_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faults").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    rank = (sys.executable, "-m", "tests.rogue_engine", "--vocab", "256", "--faults", str(tmp_path / "faults"))
    settings = ServeSettings(
        model=script("bench_delivery").write_model(str(tmp_path)),
        endpoint=f"ipc://{tmp_path}/s.ipc",
        options=service_options(num_blocks=64),
        engine_command=rank,
    )
    frozen: list[int] = []

    def announce(_: str) -> None:
        frozen.append(gc.get_freeze_count())
        os.kill(os.getpid(), signal.SIGTERM)

    gc.unfreeze()  # the suite's own
    try:
        assert run(settings, announce) == 0
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000
