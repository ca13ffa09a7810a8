"""A step between its plan and its result."""

from __future__ import annotations

import msgspec

from .cost_model import StepShape
from .rows import Int64, Rows1D


class Flight(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A plan on its way: what is needed to understand its result.

    rows: of the step, in plan order. at: the same, as a slice where they have no gap (`span`). taken: the admissions of
    all rows that there are; one whose admission is another by then has ended or was preempted meanwhile. stops: how
    often that had happened to any (`Running.stops`). sampling: indices of those that sample, None for all. sampled: of
    all rows that there are, tokens that are sampled; `Results.commit` sets those to 0 that come for nobody. shape: what
    it costs by.
    """

    step: int
    rows: Rows1D
    at: Rows1D | slice
    taken: Int64
    stops: int
    sampling: Rows1D | None
    sampled: Int64
    shape: StepShape

    @property
    def admissions(self) -> Int64:
        """Of the rows of the step."""
        admissions: Int64 = self.taken[self.rows]
        return admissions

    @property
    def samples(self) -> int:
        return self.rows.size if self.sampling is None else self.sampling.size

    @property
    def sampling_rows(self) -> Rows1D:
        """In the order of the result's tokens."""
        return self.rows if self.sampling is None else self.rows[self.sampling]
