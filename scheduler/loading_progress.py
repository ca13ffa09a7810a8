"""How far the ranks have read their weights, in words for people who wait. Times are parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from treadle.transport.messages import Loading

LOGGER = "treadle.loading"
"""Progress is logged here at DEBUG, every few seconds and at its end at INFO, in records that carry `share`, 0 to 1;
and for each rank that is ready where its time went, at INFO."""
_EVERY = 5.0
_GB = 1e9
logger = logging.getLogger(LOGGER)


class LoadingProgress:
    """Of all ranks of a group together. now: seconds, of any clock."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._ranks: dict[int, Loading] = {}
        self._began = 0.0
        self._next = 0.0
        self._ended = False

    def update(self, message: Loading, now: float) -> None:
        """Takes the latest of a rank and logs what is to be said."""
        if not self._ranks:
            self._began, self._next = now, now + _EVERY
        self._ranks[message.rank] = message
        if self._ended or len(self._ranks) < self._world_size:
            return
        done, total = (sum(sizes) for sizes in zip(*((m.done, m.total) for m in self._ranks.values()), strict=True))
        self._ended = done >= total
        level = logging.DEBUG
        if self._ended or now >= self._next:
            level, self._next = logging.INFO, now + _EVERY
        logger.log(level, "%s", progress_line(done, total, now - self._began), extra={"share": done / max(total, 1)})

    def stage(self, rank: int) -> str:
        """What a rank that has said hello and is not ready is at, as far as it has said."""
        told = self._ranks.get(rank)
        if told is None:
            return "importing and meeting the others"
        if told.done < told.total:
            return f"reading weights ({100 * told.done // told.total}%)"
        return "getting ready, with its weights read"


def progress_line(done: int, total: int, seconds: float) -> str:
    """ "weights: 3.2 of 16.1 GB (20%), 2.1 GB/s, 6 s left"; at the end how long it took. Sizes in bytes."""
    rate = done / seconds if seconds > 0 else 0.0
    if done >= total:
        return f"weights: {total / _GB:.2f} GB in {seconds:.1f} s" + (f", {rate / _GB:.2f} GB/s" if rate else "")
    line = f"weights: {done / _GB:.2f} of {total / _GB:.2f} GB ({100 * done // max(total, 1)}%)"
    return line + (f", {rate / _GB:.2f} GB/s, {(total - done) / rate:.0f} s left" if rate else "")


def phases_line(phases: Mapping[str, float]) -> str:
    """ "9.8 s: interpreter 0.3, imports 2.4, ...". Names that begin with "+" ran beside the others."""
    total = sum(seconds for name, seconds in phases.items() if not name.startswith("+"))
    return f"{total:.2f} s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in phases.items())
