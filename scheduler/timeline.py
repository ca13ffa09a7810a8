"""A recording of the live service: what the scheduler, each rank and each row did, and when.

Nothing exists of it while nobody records. `treadle/timeline.py` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import msgspec
import numpy as np

from treadle.transport.codec import Int32, pack, unpack
from treadle.transport.messages import RankTimes, RowUse, StepPlan, StepTimes, Timeline

from .request import Output, Sequence
from .step import Step

MOST_ENTRIES = 500_000
"""Rows of all steps together: some 4 MB here, and a hundred as a JSON file."""
MOST_SECONDS = 600.0
_MOST_ROWS = 1 << 16


class Recorder:
    """From its making to `timeline`. Times are `time.perf_counter`'s. rows: whose they are now.

    A row's use by one sequence has a number, so that a step needs four bytes for each of its rows.
    """

    def __init__(self, now: float, rows: Mapping[int, Sequence]) -> None:
        self.full = False
        self._began = now
        self._uses: list[RowUse] = []
        self._owners: list[Sequence] = []
        self._sequences: dict[Sequence, int] = {}
        self._table: Int32 = np.full(_MOST_ROWS, -1, np.int32)
        self._open: dict[int, StepTimes] = {}
        self._steps: list[StepTimes] = []
        self._losses: list[int] = []
        self._entries = 0
        for row, sequence in rows.items():
            if not sequence.finish:
                self._use(row, sequence, now)

    def sent(self, step: Step, plan: StepPlan, started: Items[Sequence]) -> None:
        """A plan went out. The step has its chunks by now."""
        for row in unpack(plan.release).tolist():
            use = int(self._table[row])
            if use >= 0 and not self._owners[use].finish:  # one that has ended is about to be told so
                self._close(use, step.out_at, "preempted")
        for start, sequence in zip(plan.start, started, strict=True):
            self._use(start.row, sequence, step.out_at)
        self._entries += step.rows
        self.full = self.full or self._entries > MOST_ENTRIES
        if self.full:
            return
        chunks = [self._sequences[chunk.sequence] for chunk in step.chunks]
        self._open[step.number] = StepTimes(
            number=step.number,
            tokens=step.tokens,
            plan=_us(step.plan_at),
            ready=_us(step.ready_at),
            out=_us(step.out_at),
            uses=self._table[unpack(plan.rows)].tobytes(),
            counts=plan.counts,
            chunks=pack(chunks),
            parts=pack([use for use, chunk in zip(chunks, step.chunks, strict=True) if not chunk.last]),
        )

    def landed(self, step: Step) -> None:
        """Its tokens were delivered."""
        times = self._open.pop(step.number, None)
        if times is None:
            return  # it was on its way before
        ranks = [RankTimes(rank, r.began_us, r.forward_us, r.sample_us) for rank, r in sorted(step.results.items())]
        ends = {"back": step.back_at, "applied": step.applied_at, "deliver": step.deliver_at}
        changes = {name: _us(at) for name, at in ends.items()}
        self._steps.append(msgspec.structs.replace(times, ranks=ranks, delivered=_us(step.delivered_at), **changes))

    def ended(self, output: Output, now: float) -> None:
        """A sequence has ended."""
        use = self._sequences.pop(output.sequence, -1)
        self._close(use, now, output.finish)

    def lost(self, now: float) -> None:
        """The engine group is gone: no row is anybody's, and what was on its way never lands."""
        for use in self._sequences.values():
            self._close(use, now, "lost")
        self._sequences.clear()
        self._table[:] = -1
        self._open.clear()
        self._losses.append(_us(now))

    def timeline(self, now: float) -> Timeline:
        return Timeline(
            began=_us(self._began),
            ended=_us(now),
            steps=self._steps,
            uses=self._uses,
            losses=self._losses,
            full=self.full,
        )

    def _use(self, row: int, sequence: Sequence, now: float) -> None:
        request = sequence.request
        self._table[row] = self._sequences[sequence] = len(self._uses)
        self._owners.append(sequence)
        self._uses.append(RowUse(row, request.id, sequence.index, request.prompt_len, _us(now)))

    def _close(self, use: int, now: float, how: str) -> None:
        """Nothing, where it was closed before."""
        if use >= 0 and not self._uses[use].how:
            self._uses[use] = msgspec.structs.replace(self._uses[use], ended=_us(now), how=how)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
