"""How much of the cache running sequences will still need, and whether one more fits beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from treadle.kvcache import BlockPool
from treadle.kvcache.arrays import numbers_of
from treadle.kvcache.invariant import require

from .config import CoreConfig
from .output_lengths import Floats, Ints, Outlook, OutputLengths, Slots
from .request import Request, Sequence
from .rows import Rows

_CAUTION: Final = 1.0


@dataclass(slots=True)
class _Load:
    """Blocks that are expected to be in use at each horizon."""

    outlook: Outlook
    mean: Floats
    variance: Floats


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
        self._most = [0] * config.max_num_seqs
        self._most_sum = 0
        self._slot = np.zeros(config.max_num_seqs, np.intp)
        self._prompt = np.zeros(config.max_num_seqs, np.int64)
        self._slot_of, self._prompt_of = numbers_of(self._slot), numbers_of(self._prompt)
        self._row_blocks = config.max_blocks_per_row
        self._horizons = np.array([1 << i for i in range(2, config.max_model_len.bit_length())] or [1], np.int64)
        self._load: _Load | None = None
        self.lengths = OutputLengths(config.max_model_len)

    @property
    def spare(self) -> int:
        """Blocks that admission leaves free: the watermark, and one for each row, which may need it in the next step.

        None when nothing runs: then any one sequence may take all.
        """
        running, watermark = self._rows.count, self._watermark
        return (running if running > watermark else watermark) if running else 0

    def enter(self, row: int, request: Request) -> None:
        """The row begins to be used, by a sequence of this request."""
        self._slot_of[row] = self.lengths.slot(request.tenant)
        self._prompt_of[row] = request.prompt_len
        most = -(-request.limit // self._block_size)
        self._most[row] = most
        self._most_sum += most

    def leave(self, row: int) -> None:
        """The row is given back."""
        self._most_sum -= self._most[row]
        self._most[row] = 0

    def check(self) -> None:
        """Raises CoreInvariantError unless what rows may come to, and what they hold, is counted right."""
        rows = self._rows
        most = np.where(rows.admission, -(-rows.limit // self._block_size), 0)
        require((most == self._most).all() and int(most.sum()) == self._most_sum, "limits of rows are miscounted")
        require(int(rows.nblocks.sum()) == rows.entries, "entries of block tables are miscounted")

    def begin(self) -> None:
        """A step begins to admit: what was reckoned in an earlier one holds no longer."""
        self._load = None

    def allows(self, sequence: Sequence, known: int, blocks: int) -> bool:
        """One more may run, that takes so many blocks out of what is available now. If so, it counts from now on.

        known: its tokens.
        """
        running = self._rows.count
        if self._mode == "none" or not running or self._sum_fits(sequence.request.limit, known, blocks):
            return True
        if (running + 1) * self._row_blocks + blocks <= self._pool.available:
            return True
        return self._mode == "estimate" and self._peak_fits(sequence, known, blocks)

    def _sum_fits(self, limit: int, known: int, blocks: int) -> bool:
        """Everybody may grow to the limit."""
        size = self._block_size
        growth = self._most_sum - self._rows.entries
        own = -(-limit // size) - -(-known // size)
        return blocks + own + growth + self._watermark <= self._pool.available

    def _peak_fits(self, sequence: Sequence, known: int, blocks: int) -> bool:
        slot = self.lengths.slot(sequence.request.tenant)
        load = self._load
        if load is None or slot not in load.outlook.kinds:
            load = self._load = self._running_load(slot)
        request = sequence.request
        one = np.array([known], np.int64)
        mean, variance = self._expect(
            load.outlook, np.array([slot]), one, one - request.prompt_len, np.array([request.limit]), np.array([blocks])
        )
        mean, variance = load.mean + mean, load.variance + variance
        if float((mean + _CAUTION * np.sqrt(variance)).max()) + self._watermark > self._pool.total:
            return False
        load.mean, load.variance = mean, variance
        return True

    def _running_load(self, slot: int) -> _Load:
        """Shared blocks count once: each row's part of what is in use, by the length of its table."""
        rows = self._rows
        live = rows.admission.nonzero()[0]
        tables, known = rows.nblocks[live], rows.known[live]
        slots, output = self._slot[live], known - self._prompt[live]
        held = tables.astype(np.float64) * (self._pool.used / max(1, int(tables.sum())))
        outlook = self.lengths.outlook(np.append(slots, slot), np.append(output, 0))
        return _Load(outlook, *self._expect(outlook, slots, known, output, rows.limit[live], held))

    def _expect(
        self, outlook: Outlook, slots: Slots, known: Ints, output: Ints, limit: Ints, held: Floats
    ) -> tuple[Floats, Floats]:
        """Mean and variance of the blocks that these hold, at each horizon."""
        ahead = self._horizons[:, None]
        alive = outlook.survival(slots, output, self._horizons) * (known + ahead < limit)
        then = held + ahead / self._block_size
        return (alive * then).sum(axis=1), (alive * (1 - alive) * then * then).sum(axis=1)
