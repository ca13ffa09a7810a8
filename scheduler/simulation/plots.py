"""Pictures of a simulation, by matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from treadle.errors import ConfigError

from .fleet import Part
from .report import latencies
from .workload import Workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")


def check_plots(directory: Path) -> None:
    """Raises ConfigError when plots cannot be drawn there; before a long simulation, not after."""
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'treadle[plots]'")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}") from error


def write_plots(
    directory: Path, kind: str, workload: Workload, parts: Sequence[Part], report: dict[str, Any]
) -> list[Path]:
    """Draws `latency` and `timeline` into the directory; returns the files. kind: one of FORMATS."""
    check_plots(directory)
    from matplotlib.figure import Figure  # no pyplot: no window, no state shared with the program

    found = latencies(workload, parts)
    latency = Figure(figsize=(10, 4), layout="constrained")
    left, middle, right = latency.subplots(1, 3)
    _shares(left, found.ttft, "time to first token, s", report["goodput"]["goals"]["ttft"])
    _shares(middle, found.tpot, "time per output token, s", report["goodput"]["goals"]["tpot"])
    _shares(right, found.end_to_end, "end to end, s", 0.0)
    course = Figure(figsize=(10, 7), layout="constrained")
    rows, cache, rate = course.subplots(3, 1, sharex=True)
    line = report["timeline"]
    times = (np.arange(len(line["running"])) + 1) * line["every"]
    rows.plot(times, line["running"], label="running")
    rows.plot(times, line["waiting"], label="waiting")
    rows.set_ylabel("sequences")
    rows.legend()
    cache.plot(times, line["occupancy"])
    cache.set_ylabel("cache in use")
    cache.set_ylim(0, 1)
    rate.plot(times, np.diff(line["generated"], prepend=0) / line["every"])
    rate.set_ylabel("output tokens/s")
    rate.set_xlabel("s")
    files = {"latency": latency, "timeline": course}
    for name, figure in files.items():
        figure.savefig(directory / f"{name}.{kind}")
    return [directory / f"{name}.{kind}" for name in files]


def _shares(axes: Axes, values: npt.NDArray[np.float64], label: str, goal: float) -> None:
    """Which share of the requests is at most so long, with the goal as a line."""
    known = np.sort(values[np.isfinite(values)])
    axes.plot(known, np.arange(1, known.size + 1) / max(known.size, 1))
    if goal:
        axes.axvline(goal, linestyle="--", color="gray")
    axes.set_xlabel(label)
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1)
