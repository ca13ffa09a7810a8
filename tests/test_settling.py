"""A server that is ready has taken what stays out of Python's search for cycles."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from treadle.scheduler.options import service_options
from treadle.serve import ServeSettings, run

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def test_a_server_settles_before_it_says_that_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "faults").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    rank = (sys.executable, "-m", "tests.rogue_engine", "--vocab", "256", "--faults", str(tmp_path / "faults"))
    settings = ServeSettings(
        model=str(tmp_path / "config.json"),
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
