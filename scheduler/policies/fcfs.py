"""First come, first served."""

from __future__ import annotations

from .interface import Policy


class FcfsPolicy(Policy):
    """By arrival; `priority` and `tenant` mean nothing.

    Guarantee: nobody who came later gets a row before one who waits. Blocks running out, the youngest gives way.
    Starvation bound: a request waits for those who came before it, and for nobody else.
    """

    name = "fcfs"
