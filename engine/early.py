"""What a rank begins before it imports torch, which takes seconds: other processors and the driver are idle then.

Nothing here is needed for a start to succeed. What fails is done later, by those who need it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from treadle.errors import ProtocolError
from treadle.transport.codec import Codec
from treadle.transport.messages import Configure, PlanMessage

from .phases import Phases

logger = logging.getLogger(__name__)
_MODULE = "treadle.engine.cuda.compile_ahead"
# Beyond this the rank goes on, and compiles what is missing itself. Seconds.
_PATIENCE = 120.0


class Compiler:
    """A process that fills Triton's cache with the kernels of this rank, beside whatever the rank does."""

    def __init__(self, frame: bytes) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._process.stdin is not None:
            self._process.stdin.write(frame)
            self._process.stdin.close()
            self._process.stdin = None

    def wait(self) -> dict[str, float]:
        """The seconds that it took, by what for; empty where it did not get through."""
        try:
            said, _ = self._process.communicate(timeout=_PATIENCE)
            return msgspec.json.decode(said, type=dict[str, float])
        except (subprocess.TimeoutExpired, msgspec.DecodeError) as error:
            self._process.kill()
            self._process.wait()
            logger.warning("kernels were not compiled ahead: %s", error)
            return {}


def _silent(done: int, total: int) -> None:
    return None


@dataclass(slots=True)
class Start:
    """What goes along with a start. report: takes the bytes of weights that are there, and how many there will be.

    masks: descriptor of the memory for masks that `Configure.mask_slots` has room in.
    """

    phases: Phases = field(default_factory=Phases)
    report: Callable[[int, int], None] = _silent
    compiler: Compiler | None = None
    masks: int = -1


def wants_gpu(frame: bytes, codec: Codec[PlanMessage]) -> bool:
    """frame: the message that should be `Configure`; if it is not, others will say so."""
    try:
        configure = codec.decode(frame)
    except ProtocolError:
        return False
    return isinstance(configure, Configure) and configure.device == "cuda"


def begin(frame: bytes, rank: int) -> Compiler | None:
    """For a rank on a GPU. frame: of `Configure`."""
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")  # as torch has it
    threading.Thread(target=_make_context, args=(rank,), name="context", daemon=True).start()
    if rank or importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET", "0") != "0":
        return None
    try:
        return Compiler(frame)
    except OSError as error:
        logger.warning("kernels are not compiled ahead: %s", error)
        return None


def identify_triton() -> threading.Thread:
    """Imports Triton, and has it hash itself, which is 0.4 GB to read, on a thread. Its cache is looked up by that.

    The import is this thread's: two that import parts of one package at once may wait for each other.
    """
    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # another version keeps it elsewhere, and will hash when it must
        hash_it: Callable[[], object] = _nothing
    else:
        hash_it = triton_key
    thread = threading.Thread(target=hash_it, name="triton", daemon=True)
    thread.start()
    return thread


def _nothing() -> None:
    return None


def _make_context(device: int) -> None:
    """The device's primary context, which torch will use; its errors are torch's to report (CUDA driver API)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(handle), device) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
