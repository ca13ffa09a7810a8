"""What several test files share: one served model for the whole run, small checkpoints, and looking for leftovers.

The suite may run in several processes (`-n auto`). Each has a directory of its own for sockets and temporary files, so
that a test that looks for leftovers sees nobody else's.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import psutil
import pytest

from treadle import LLM

# A shell that starts the suite in the background has SIGINT ignored, one under nohup SIGHUP, and every program that a
# test starts inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The longest first, so that no process is left alone with one of them at the end.
LONG_FILES = (
    "test_exactness.py",
    "test_real_model.py",
    "test_compiled_form.py",
    "test_chaos.py",
    "test_triton_sampling.py",
    "test_recovery.py",
    "test_guided.py",
    "test_embedded.py",
    "test_nothing_left.py",
    "test_triton_attention.py",
    "test_client.py",
    "test_supervision.py",
    "test_http_service.py",
    "test_cli.py",
    "test_core_machine.py",
    "test_http_load.py",
    "test_resume.py",
    "test_swap_engine.py",
    "test_http_schema.py",
    "test_model.py",
    "test_cuda_runner.py",
    "test_drain.py",
    "test_admission.py",
    "test_compile_ahead.py",
    "test_ui.py",
    "test_http.py",
    "test_soak.py",
    "test_bad_models.py",
    "test_health.py",
    "test_triton_runner.py",
    "test_replay.py",
    "test_native.py",
)
MOST_PROCESSES = 4


def own_directory() -> Path:
    """Takes this process's directory into use. Its name is short: the path of a socket has little room."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")  # the process that started it made, and will remove, the parent
    path = Path(tempfile.gettempdir(), worker) if worker else Path(tempfile.mkdtemp(prefix="tt-"))
    path.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = os.environ["XDG_RUNTIME_DIR"] = tempfile.tempdir = str(path)
    return path


OWN = own_directory()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process for each core that we may use, but no crowd, for each may serve a real model."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core; the process that starts them needs no torch
        import torch

        torch.set_num_threads(1)
    if os.environ.get("PYTEST_XDIST_WORKER") or config.option.basetemp is None:
        config.option.basetemp = OWN / "t"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The imports of all files make objects by the million, and nothing of it is garbage, then or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_unconfigure() -> None:
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        shutil.rmtree(OWN, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After everything was closed, also what only one test had open."""
    yield
    eventually(lambda: not leftovers(), "no runtime directory is left")


@pytest.fixture
def runtime() -> Path:
    """An empty runtime directory for one program; `tmp_path` would be too long for sockets."""
    return Path(tempfile.mkdtemp(prefix="r-", dir=OWN))


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The real model on two ranks in fp32, open for the whole run; usable from any event loop."""
    with LLM("smollm2-135m", tensor_parallel_size=2, dtype="float32", num_blocks=600, debug=True) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama 3 with a byte tokenizer: quick to start."""
    from .modelkit import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3")


def leftovers() -> set[str]:
    """Runtime directories of services that this process's tests started."""
    return {str(path) for path in OWN.glob("treadle-*")}


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that still run; zombies do not."""
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def eventually(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Waits for another process to get there; fails with `what` when it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} within {seconds:g} s"
        time.sleep(0.02)
