"""What a process of our own does when it is ready, so that nobody waits for it later."""

from __future__ import annotations

import gc


def settle() -> None:
    """Takes what is there out of Python's search for cycles: modules, classes, tables, which stay to the end.

    A full search looks at every object and lets nothing else run: tens of milliseconds on busy cores, in which neither
    a refusal goes out nor a plan. Never in a program that embeds us: the collector is its own.
    """
    gc.collect()
    gc.freeze()
