"""What several test files share: one served model for the whole run, small checkpoints, and looking for leftovers."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from treadle import LLM

from .modelkit import make_checkpoint

# A shell that starts the suite in the background has SIGINT ignored, and every program that a test starts inherits it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The real model on two ranks in fp32, open for the whole run; usable from any event loop."""
    with LLM("smollm2-135m", tensor_parallel_size=2, dtype="float32", num_blocks=600, debug=True) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama 3 with a byte tokenizer: quick to start."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3")


def leftovers() -> set[str]:
    """Runtime directories of this user's services."""
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return {str(path) for path in Path(base).glob("treadle-*") if not path.name.startswith("treadle-0")}


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that still run; zombies do not."""
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Waits for another process to get there; fails with `what` when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} within {seconds:g} s"
        time.sleep(0.02)
