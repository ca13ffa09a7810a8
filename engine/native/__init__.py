"""The C kernels of the CPU engine: compiled on first use by the system's compiler, loaded with ctypes."""

from __future__ import annotations

from .build import load_native
from .library import Native

__all__ = ["Native", "load_native"]
