"""In which form the scheduler is installed: as Python, or compiled (docs/decisions/015-compiled-scheduler.md)."""

from __future__ import annotations

from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec


def is_compiled() -> bool:
    """Whether the hot modules are machine code. Looks for the core without importing it."""
    spec = find_spec("treadle.scheduler.core")
    return spec is not None and isinstance(spec.loader, ExtensionFileLoader)
