"""From the C sources beside this file to a loaded library, once per machine."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

from .library import Native

_LOG = logging.getLogger(__name__)
_FLAGS = (
    *("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-shared", "-fPIC"),
)
# Newer compilers know the machine by -march on x86 and by -mcpu elsewhere; without either, the code is portable.
_TUNING = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_TIMEOUT = 300.0
"""Of all attempts together: well under the time that a start may take, or who hangs here could not go on without."""
_ONCE = threading.Lock()


def cache_dir() -> Path:
    """$TREADLE_CACHE, or `treadle` under $XDG_CACHE_HOME or ~/.cache, each with `native` below."""
    if own := os.environ.get("TREADLE_CACHE"):
        return Path(own) / "native"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "treadle" / "native"


def load_native() -> Native | None:
    """The kernels, compiled if this machine has not done so before; None, with the reason in the log, if it cannot.

    Safe to call in several threads and processes at once: one compiles, the others wait for it. It takes seconds and
    does not need torch, so a program in a hurry calls it in a thread while torch is imported.
    """
    with _ONCE:
        return _loaded()


@cache
def _loaded() -> Native | None:
    return try_load()


def try_load() -> Native | None:
    """`load_native`, without its memory of what came of it before."""
    try:
        return Native(_build())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _LOG.warning("no native kernels, the slower torch ones are used: %s", error)
        return None


def _build() -> Path:
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not compiler:
        raise RuntimeError("there is no C compiler (cc, gcc or clang) on PATH")
    target = cache_dir() / f"{_key(sources, compiler)}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go of it when the process ends, however it ends
            if not target.exists():
                _compile(compiler, [str(source) for source in sources if source.suffix == ".c"], target)
    return target


def _key(sources: list[Path], compiler: str) -> str:
    """A name for what the sources become here: a cache shared by unlike machines holds one library for each."""
    digest = hashlib.sha256(" ".join((compiler, *_FLAGS, platform.machine(), _processor())).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _compile(compiler: str, sources: list[str], target: Path) -> None:
    """Writes `target` whole or not at all. Raises RuntimeError with the compiler's words."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        words, until = "", time.monotonic() + _COMPILE_TIMEOUT
        for tuning in _TUNING:
            command = [*compiler.split(), *_FLAGS, *tuning, *sources, "-o", str(output), "-lm"]
            left = until - time.monotonic()
            done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
            if done.returncode == 0:
                output.replace(target)
                return
            words = words or done.stderr
        raise RuntimeError(f"{compiler} failed: {words.strip()[:2000]}")
