"""What a short time went into, by what Linux counts anyway: a host that stood still, a wait for a core, or work.

On a virtual machine all cores at once can stand still for tens of milliseconds, whatever runs on them. Nobody inside
notices but by the clock, and by what the kernel calls stolen (proc_stat(5); in hundredths of a second).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_STOLEN = 8  # the column of a core's line, its name included


@dataclass(frozen=True, slots=True)
class Thread:
    """Seconds since its start: on a core, and ready to run without one (sched-stats of the kernel's documentation)."""

    ran: float
    waited: float


@dataclass(frozen=True, slots=True)
class Moment:
    """What the clocks showed. Seconds; stolen: of each core."""

    at: float
    stolen: tuple[float, ...]
    threads: dict[str, Thread]


def look(pids: dict[str, int]) -> Moment:
    """Now. pids: by name; of each process its first thread is looked at."""
    return Moment(time.perf_counter(), _stolen(), {name: _thread(pid) for name, pid in pids.items()})


def held_up(before: Moment, after: Moment) -> dict[str, float]:
    """Milliseconds between two moments, and what each thread did of them. stolen_ms: of the core that lost most."""
    stolen = max((late - early for early, late in zip(before.stolen, after.stolen, strict=True)), default=0.0)
    times = {"ms": after.at - before.at, "stolen_ms": stolen}
    for name, thread in after.threads.items():
        times[f"{name}_ran_ms"] = thread.ran - before.threads[name].ran
        times[f"{name}_waited_ms"] = thread.waited - before.threads[name].waited
    return {name: round(seconds * 1e3, 1) for name, seconds in times.items()}


def _stolen() -> tuple[float, ...]:
    with open("/proc/stat", "rb") as file:
        lines = [line.split() for line in file.read().splitlines() if line.startswith(b"cpu")]
    tick = 1 / os.sysconf("SC_CLK_TCK")
    return tuple(int(line[_STOLEN]) * tick for line in lines[1:] if len(line) > _STOLEN)


def _thread(pid: int) -> Thread:
    ran, waited, _ = Path(f"/proc/{pid}/schedstat").read_text().split()
    return Thread(int(ran) * 1e-9, int(waited) * 1e-9)
