"""How much of the cache running sequences will still need, and whether one more fits beside them."""

from __future__ import annotations

import numpy as np

from treadle.kvcache import BlockPool

from .config import CoreConfig
from .output_lengths import OutputLengths
from .request import Sequence
from .rows import Rows, Rows1D

_CAUTION = 2.0


class Reservation:
    """Admission looks ahead, so that it need not take back what it gave.

    `reserve_output` is "none": nothing is kept for outputs to come, and blocks that run out mean preemption.
    "full": every row may grow to its limit, so nobody is ever preempted for it, and much stays empty. "estimate":
    what the outputs of the tenant's requests tell.

    The estimate is of the *peak* over time, not of the sum of all needs, since those who end give back what they have
    before others need it (Gong et al.: Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025). Some
    steps ahead, a row holds what it holds now and what it will have grown by then, if it still runs; how likely it
    does, the outputs that have ended tell. The sum over rows has a mean and a deviation at each of some horizons, and
    one more is admitted while the mean and `_CAUTION` deviations fit.
    """

    def __init__(self, config: CoreConfig, rows: Rows, pool: BlockPool) -> None:
        self._mode = config.reserve_output
        self._block_size = config.block_size
        self._watermark = int(config.watermark * (config.num_blocks - 1))
        self._rows = rows
        self._pool = pool
        self._slot = np.zeros(config.max_num_seqs, np.intp)
        self._prompt = np.zeros(config.max_num_seqs, np.int32)
        self._horizons = (2 ** np.arange(0, 25, 0.5)[4:]).astype(np.int32)
        self.lengths = OutputLengths(config.max_model_len)

    @property
    def spare(self) -> int:
        """Blocks that admission leaves free: the watermark, and one for each row, which may need it in the next step.

        None when nothing runs: then any one sequence may take all.
        """
        running = self._rows.count
        return max(running, self._watermark) if running else 0

    def enter(self, row: int, sequence: Sequence) -> None:
        self._slot[row] = self.lengths.slot(sequence.request.tenant)
        self._prompt[row] = sequence.request.prompt_len

    def allows(self, sequence: Sequence, blocks: int) -> bool:
        """One more may run, that takes so many blocks out of what is available now."""
        if self._mode == "none" or not self._rows.count:
            return True
        live = self._rows.admission.nonzero()[0]
        if self._mode == "full":
            return self._sum_fits(live, sequence, blocks)
        return self._peak_fits(live, sequence, blocks)

    def _sum_fits(self, live: Rows1D, sequence: Sequence, blocks: int) -> bool:
        rows, size = self._rows, self._block_size
        growth = int((-(-rows.limit[live] // size) - rows.nblocks[live]).sum())
        own = -(-sequence.request.limit // size) - -(-sequence.known // size)
        return blocks + own + growth + self._watermark <= self._pool.available

    def _peak_fits(self, live: Rows1D, sequence: Sequence, blocks: int) -> bool:
        """Shared blocks count once: each row's part of what is in use, by the length of its table."""
        rows, pool = self._rows, self._pool
        tables = rows.nblocks[live]
        held = np.append(tables * (pool.used / max(1, int(tables.sum()))), blocks)
        known = np.append(rows.known[live], np.int32(sequence.known))
        limit = np.append(rows.limit[live], np.int32(sequence.request.limit))
        prompt = np.append(self._prompt[live], np.int32(sequence.request.prompt_len))
        slot = np.append(self._slot[live], self.lengths.slot(sequence.request.tenant))
        ahead = self._horizons[: np.searchsorted(self._horizons, (limit - known).max())]
        alive = self.lengths.survival(slot, known - prompt, ahead) * (known + ahead[:, None] < limit)
        then = held + ahead[:, None] / self._block_size
        mean = (alive * then).sum(axis=1)
        deviation = np.sqrt((alive * (1 - alive) * then * then).sum(axis=1))
        return float((mean + _CAUTION * deviation).max(initial=0.0)) + self._watermark <= pool.total
