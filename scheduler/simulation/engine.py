"""An engine that knows only how far each row is: what a step computes, and how many rows sample.

`FakeEngine` verifies every context; this one believes the plans, which is a hundred times faster. Like a real rank it
knows nothing but plans, which is all that an event log has. A simulated replica need not ask it, since its own core
knows the same of each plan that it makes; the tests run all of them beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import StepShape
from treadle.transport.codec import Int32, unpack
from treadle.transport.messages import StepPlan


@dataclass(slots=True)
class Executed:
    """What a step did. samples: how many rows sampled."""

    shape: StepShape
    samples: int


class SimulatedEngine:
    """Plans are executed in order."""

    def __init__(self, config: CoreConfig) -> None:
        self._computed: npt.NDArray[np.int64] = np.zeros(config.max_num_seqs, np.int64)
        self._known: dict[int, int] = {}
        """Of rows whose tokens are not all computed yet: how many there are. `_begun` is true for these rows."""
        self._begun: npt.NDArray[np.bool_] = np.zeros(config.max_num_seqs, np.bool_)

    def run(self, plan: StepPlan) -> Executed:
        if plan.release:
            for row in unpack(plan.release).tolist():
                self._known.pop(row, None)
                self._begun[row] = False
        for start in plan.start:
            self._computed[start.row] = start.computed
            self._known[start.row] = len(start.tokens) // 4
            self._begun[start.row] = True
        rows = unpack(plan.rows)
        if self._known:
            new = {start.row for start in plan.start}
            executed = self._mixed(rows, unpack(plan.counts), new)
        else:
            executed = Executed(self._decode(rows), rows.size)
        if plan.copy_out or plan.copy_in:
            copied = {"blocks_out": len(plan.copy_out) // 8, "blocks_in": len(plan.copy_in) // 8}
            executed.shape = msgspec.structs.replace(executed.shape, **copied)
        return executed

    def _decode(self, rows: Int32) -> StepShape:
        computed = self._computed[rows] + 1
        self._computed[rows] = computed
        return StepShape(0, rows.size, int(computed.sum()))

    def _mixed(self, rows: Int32, counts: Int32, new: set[int]) -> Executed:
        """The last token of a prompt that was begun in an earlier step is computed as a decode is, and counted so."""
        known, chunks = self._known, self._begun[rows]
        for row in rows[chunks & (counts == 1)].tolist():
            if row not in new and self._computed[row] + 1 == known[row]:
                self._caught_up(row)
        chunks = self._begun[rows]
        shape = self._decode(rows[~chunks])
        samples = shape.decode_rows
        for row, count in zip(rows[chunks].tolist(), counts[chunks].tolist(), strict=True):
            end = int(self._computed[row]) + count
            self._computed[row] = end
            shape = shape.with_chunk(count, end)
            if end == known[row]:
                self._caught_up(row)
                samples += 1
        return Executed(shape, samples)

    def _caught_up(self, row: int) -> None:
        del self._known[row]
        self._begun[row] = False
