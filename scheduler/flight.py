"""A step between its plan and its result."""

from __future__ import annotations

import msgspec

from .cost_model import StepShape
from .rows import Int64, Rows1D


class Flight(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A plan on its way: what is needed to understand its result.

    rows, admissions: of all rows of the step, in plan order. A row whose admission is another one by then has ended
    or was preempted meanwhile. sampling: indices of those that sample, None for all. shape: what it costs by.
    at: the same rows, as a slice where they have no gap (`span`).
    """

    step: int
    rows: Rows1D
    admissions: Int64
    sampling: Rows1D | None
    shape: StepShape
    at: Rows1D | slice

    @property
    def samples(self) -> int:
        return self.rows.size if self.sampling is None else self.sampling.size

    def sampled(self) -> tuple[Rows1D, Int64]:
        """Rows and admissions in the order of the result's tokens."""
        if self.sampling is None:
            return self.rows, self.admissions
        return self.rows[self.sampling], self.admissions[self.sampling]
