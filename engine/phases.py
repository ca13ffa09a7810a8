"""Where a rank's start goes: every second belongs to one phase."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Phases:
    """seconds: of each phase so far, in their order. age: how long this process has been running already."""

    def __init__(self, age: float = 0.0) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - age

    def end(self, name: str) -> None:
        """What happened since the phase before (or, of the first, since the process began) was `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def process_age() -> float:
    """Seconds since this process was started; 0 where there is no /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
