"""How often Python looks for cycles while it simulates."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_THRESHOLDS = 50_000, 20, 50


@contextmanager
def few_collections() -> Iterator[None]:
    """For a process that does nothing else: a simulation makes many small objects that live long, and few cycles, so
    looking for them at the usual times is a tenth of its cost."""
    usual = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
