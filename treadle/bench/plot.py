"""A picture of a run, by matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from treadle.errors import ConfigError

from .drive import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDINGS = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigError when nothing can be drawn there; before the run, not after."""
    if find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib: pip install 'treadle[plots]'")
    if path.suffix not in _ENDINGS:
        raise ConfigError(f"plot {path}: a name that ends in {', '.join(_ENDINGS)} is allowed")
    if not path.parent.is_dir():
        raise ConfigError(f"plot {path}: there is no directory {path.parent}")


def write_plot(path: Path, records: Sequence[Record], goals: Mapping[str, float]) -> None:
    """Which share of the requests is at most so long, and how many were due, open and failed over time."""
    from matplotlib.figure import Figure  # no pyplot: no window, no state shared with the program

    good = [record for record in records if not record.error]
    figure = Figure(figsize=(10, 7), layout="constrained")
    shares: dict[str, Axes] = figure.subplot_mosaic([["ttft", "tpot", "e2el"], ["time", "time", "time"]])
    _shares(shares["ttft"], [r.ttft for r in good], "time to first token, ms", goals.get("ttft"))
    _shares(
        shares["tpot"], [r.tpot for r in good if r.tpot is not None], "time per output token, ms", goals.get("tpot")
    )
    _shares(shares["e2el"], [r.end_to_end for r in good], "end to end, ms", goals.get("e2el"))
    course = shares["time"]
    _steps(course, [r.due for r in records], "due")
    _steps(course, [r.sent for r in records], "sent")
    _steps(course, [r.ended for r in good], "answered")
    _steps(course, [r.ended for r in records if r.error], "failed")
    course.set_xlabel("s")
    course.set_ylabel("requests")
    course.legend()
    figure.savefig(path)


def _shares(axes: Axes, seconds: Sequence[float], label: str, goal: float | None) -> None:
    values = 1000 * np.sort(np.asarray(seconds, np.float64))
    axes.plot(values, np.arange(1, values.size + 1) / max(values.size, 1))
    if goal is not None:
        axes.axvline(goal, linestyle="--", color="gray")
    axes.set_xlabel(label)
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1)


def _steps(axes: Axes, seconds: Sequence[float], label: str) -> None:
    if seconds:
        axes.step(np.sort(seconds), np.arange(1, len(seconds) + 1), where="post", label=label)
