"""Kernels that are compiled before a rank asks for them: which, and by whom. Nothing here needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treadle.engine.early import Compiler, wants_gpu
from treadle.transport.codec import rank_codec
from treadle.transport.messages import Shutdown

from .groupkit import configure_for
from .modelkit import make_checkpoint

RUN_FORKED = """
import sys
from pathlib import Path
from treadle.engine.cuda.compile_ahead import run_forked
tasks = [lambda n=n: Path(sys.argv[1], str(n)).write_text("done") for n in range(40)]
tasks[int(sys.argv[2])] = lambda: 1 / 0
print(run_forked(tasks, 3))
"""

COMPILE = """
import sys
from treadle.engine.cuda import compile_ahead
from treadle.engine.kernels.elementwise import silu_mul
import torch
from triton.runtime import driver
driver.set_active(compile_ahead.NoDevice(90))
with compile_ahead.noted() as found:
    silu_mul(torch.zeros((1, 64), dtype=torch.bfloat16))
(function,) = found.values()
((_, data),) = found
kernel = function.preload(data)
print(len(kernel.asm["cubin"]) > 1000, kernel.metadata.target.arch)
"""


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Python without the interpreter of kernels, which the suite uses."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(("family", "world_size"), [("llama3", 1), ("qwen3", 2)])
def test_every_kernel_that_a_step_launches_is_known_before(family: str, world_size: int, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", family)
    done = run(["-m", "tests.aheadkit", str(model), str(world_size)])
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_noted_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(["-c", COMPILE], TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.stdout == "True 90\n", done.stderr
    assert list((tmp_path / "cache").rglob("*.cubin"))


NAMES = """
import itertools
from triton import JITFunction
from treadle.engine.kernels import identity, sampling, sampling_filters
kernels = [each for module in (sampling, sampling_filters) for each in vars(module).values()
           if isinstance(each, JITFunction)]
names = {}
for settled, backward in itertools.product((True, False), (True, False)):
    for kernel in kernels:
        kernel.hash, kernel.used_global_vals = None, {}
    if settled:
        identity.settle()
    for kernel in reversed(kernels) if backward else kernels:
        kernel.cache_key
    names[settled, backward] = [kernel.cache_key for kernel in kernels]
print(len(kernels) > 15, names[True, True] == names[True, False], names[False, True] == names[False, False])
"""


def test_a_kernel_has_one_name_in_the_cache_whatever_was_compiled_before() -> None:
    """The compiler and the ranks meet kernels in different orders, and Triton's own names depend on it.

    Where the last is True, this Triton needs no settling: kernels/identity.py can go.
    """
    pytest.importorskip("triton")
    done = run(["-c", NAMES])
    assert done.stdout == "True True False\n", done.stderr


LATE = """
import types
from treadle.engine.cuda.late_kernels import LateKernels
from triton import knobs
late = LateKernels()
for name, hit in (("_other", True), ("_kernel", False), ("_kernel", False), ("_first", False)):
    knobs.compilation.listener(
        src=None, metadata={"name": name}, metadata_group={}, times=types.SimpleNamespace(total=500_000),
        cache_hit=hit,
    )
print(late.end(), knobs.compilation.listener)
"""


def test_what_is_compiled_late_is_counted() -> None:
    pytest.importorskip("triton")
    done = run(["-c", LATE])
    assert done.stdout == "{'+ 3 compiled late (_first, _kernel x2)': 1.5} None\n", done.stderr


def test_children_share_the_tasks_and_one_that_fails_is_counted(tmp_path: Path) -> None:
    """The others take over what a failed child leaves, but for the task that it died of."""
    done = run(["-c", RUN_FORKED, str(tmp_path), "7"])
    assert done.stdout == "1\n", done.stderr
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [n for n in range(40) if n != 7]
    assert "ZeroDivisionError" in done.stderr


def test_what_a_rank_begins_early_is_for_gpus(tmp_path: Path) -> None:
    codec = rank_codec()
    assert not wants_gpu(codec.encode(configure_for(tmp_path, tmp_path)), codec)
    assert not wants_gpu(b"no message", codec)
    assert not wants_gpu(codec.encode(Shutdown()), codec)
    assert wants_gpu(codec.encode(configure_for(tmp_path, tmp_path, device="cuda")), codec)


def test_a_compiler_that_fails_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Its rank goes on without it."""
    compiler = Compiler(rank_codec().encode(Shutdown()))
    assert compiler.wait() == {}
    assert "not compiled ahead" in caplog.text
