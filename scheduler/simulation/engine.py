"""An engine that knows only how far each row is: what a step computes, and made-up tokens, in a few vector operations.

`FakeEngine` verifies every context; this one believes the plans, which is a hundred times faster. Like a real rank it
knows nothing but plans, and the tests run both beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import StepShape
from treadle.transport.codec import Int32, pack, unpack
from treadle.transport.messages import StepPlan

_POOL = 1 << 16


@dataclass(slots=True)
class Executed:
    """What a step did. tokens: int32, one per row that sampled.

    recent: every row that has just caught up with its prompt, and so may have sampled its first token, is among the
    last so many rows of the step.
    """

    step: int
    tokens: bytes
    shape: StepShape
    recent: int


class SimulatedEngine:
    """Plans are executed in order; each row that samples gets some token. Never EOS: lengths come from the workload."""

    def __init__(self, config: CoreConfig) -> None:
        self._computed: npt.NDArray[np.int64] = np.zeros(config.max_num_seqs, np.int64)
        self._known: dict[int, int] = {}
        """Of rows whose tokens are not all computed yet: how many there are. `_begun` is true for these rows."""
        self._begun: npt.NDArray[np.bool_] = np.zeros(config.max_num_seqs, np.bool_)
        random = np.random.Generator(np.random.PCG64(0))
        self._pool = pack(random.integers(0, config.vocab_size, _POOL + config.max_num_seqs))
        self._at = 0

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
            shape, sampled, recent = self._mixed(rows, unpack(plan.counts))
        else:
            shape, sampled, recent = self._decode(rows), rows.size, 0
        if plan.copy_out or plan.copy_in:
            copied = {"blocks_out": len(plan.copy_out) // 8, "blocks_in": len(plan.copy_in) // 8}
            shape = msgspec.structs.replace(shape, **copied)
        self._at = (self._at + sampled) % _POOL
        return Executed(plan.step, self._pool[4 * self._at : 4 * (self._at + sampled)], shape, recent)

    def _decode(self, rows: Int32) -> StepShape:
        computed = self._computed[rows] + 1
        self._computed[rows] = computed
        return StepShape(0, rows.size, int(computed.sum()))

    def _mixed(self, rows: Int32, counts: Int32) -> tuple[StepShape, int, int]:
        """The shape, how many rows sample, and `recent`."""
        known = self._known
        chunks = self._begun[rows]
        shape = self._decode(rows[~chunks])
        sampled, recent = shape.decode_rows, 0
        places = chunks.nonzero()[0].tolist()
        for place, row, count in zip(places, rows[chunks].tolist(), counts[chunks].tolist(), strict=True):
            end = int(self._computed[row]) + count
            self._computed[row] = end
            shape = shape.with_chunk(count, end)
            if end == known[row]:
                del known[row]
                self._begun[row] = False
                sampled += 1
                recent = recent or rows.size - place
        return shape, sampled, recent
