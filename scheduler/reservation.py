"""How much of the cache running sequences will still need, and whether one more fits beside them."""

from __future__ import annotations

import numpy as np

from treadle.kvcache import BlockPool

from .config import CoreConfig
from .output_lengths import Floats, OutputLengths
from .request import Sequence
from .rows import Rows, Rows1D


class Reservation:
    """Admission looks ahead, so that it need not take back what it gave.

    `reserve_output` is "none": nothing is kept for outputs to come, and blocks that run out mean preemption.
    "full": every row may grow to its limit, so nobody is ever preempted for it, and much stays empty. "estimate":
    what the outputs of the tenant's requests tell.

    The estimate is of the *peak* over time, not of the sum of all needs, since those who end give back what they have
    before others need it (Gong et al.: Past-Future Scheduler for LLM Serving under SLA Guarantees, ASPLOS 2025). With
    rows by what is still to come, the longest first, and a token a step each, the i-th ends after r_i steps; by then
    the first i rows hold what they hold now and i · r_i tokens more.
    """

    def __init__(self, config: CoreConfig, rows: Rows, pool: BlockPool) -> None:
        self._mode = config.reserve_output
        self._block_size = config.block_size
        self._watermark = int(config.watermark * (config.num_blocks - 1))
        self._rows = rows
        self._pool = pool
        self._slot = np.zeros(config.max_num_seqs, np.intp)
        self._prompt = np.zeros(config.max_num_seqs, np.int32)
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
        known = np.append(rows.known[live], sequence.known)
        limit = np.append(rows.limit[live], sequence.request.limit)
        prompt = np.append(self._prompt[live], sequence.request.prompt_len)
        slot = np.append(self._slot[live], self.lengths.slot(sequence.request.tenant))
        coming: Floats = np.minimum(self.lengths.remaining(slot, known - prompt), limit - known)
        order = np.argsort(-coming, kind="stable")
        ahead = np.arange(1, order.size + 1)
        peak = np.cumsum(held[order]) + ahead * (coming[order] / self._block_size)
        return float(peak.max()) + self._watermark <= pool.total
