"""How long answers are, learned by tenant while they end."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np
import numpy.typing as npt

from treadle.kvcache.arrays import floats_of, numbers_of

OVERALL: Final = 0
_TENANTS: Final = 256
_MEMORY: Final = 256
"""Ends after which one counts a third."""
_KEPT: Final = 1 - 1 / _MEMORY
_MOST_WEIGHT: Final = 1e100
_PRIOR: Final = 8.0
"""Ends of everybody that a tenant's own are mixed with."""
_FIRST_GUESS: Final = 128
_STEPS: Final = 8
"""Classes per doubling of the length."""
_DOUBT: Final = 0.1
"""Weight, in ends, of "half of them end with each doubling", which is all there is beyond the longest ever seen."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Slots = npt.NDArray[np.intp]


class OutputLengths:
    """For each tenant a histogram of the lengths of finished outputs, in classes of about a tenth, with forgetting.

    What is asked of it is how likely an output that has reached a certain length is to go on so much longer
    (`Outlook`). slot: number of a tenant's statistics; the tenants heard of last have one, the others share that of
    everybody.

    To forget, the others are not made smaller, but each new end weighs more: that is one number instead of hundreds.
    `_weight`: of the newest end of a slot, by which its counts are divided when they are read.
    """

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._class = _classes(np.arange(max_len + 1))
        self._counts: Floats = np.zeros((_TENANTS, int(self._class[-1]) + 1))
        self._weight: Floats = np.ones(_TENANTS)
        self._class_of = numbers_of(self._class)
        self._count_of = floats_of(self._counts)
        self._weight_of = floats_of(self._weight)
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._counts[OVERALL, self._class[min(_FIRST_GUESS, max_len)]] = 1.0

    def slot(self, tenant: str) -> int:
        return self._slots.get(tenant, OVERALL)

    def note(self, tenant: str, length: int) -> None:
        """An output of the tenant has ended by itself, with so many tokens."""
        slot = self._slots.get(tenant)
        if slot is None:
            slot = self._new_slot(tenant)
        self._slots.move_to_end(tenant)
        place = self._class_of[length]
        self._add(OVERALL, place)
        self._add(slot, place)

    def outlook(self, slots: Slots, lengths: Ints) -> Outlook:
        """What can be expected, given that outputs of these lengths are still going on.

        Those count, too: at first only short ones have ended, and who asks the ended alone expects too little. So it
        is the share that ends in each class of all that were ever seen to get there (Kaplan, Meier: Nonparametric
        Estimation from Incomplete Observations, 1958).
        """
        kinds, at = np.unique(slots, return_inverse=True)
        overall = self._counts[OVERALL] / self._weight[OVERALL]
        ended = self._counts[kinds] / self._weight[kinds][:, None] + (kinds != OVERALL)[:, None] * (
            _PRIOR / overall.sum() * overall
        )
        running = np.zeros_like(ended)
        np.add.at(running, (at, self._class[lengths]), 1.0)
        reached = _from_the_end(ended) + _from_the_end(running) - running
        ending = (ended + _DOUBT * (1 - 0.5 ** (1 / _STEPS))) / (reached + _DOUBT)
        reach = np.cumprod(1 - ending, axis=1)
        reach = np.concatenate((np.ones((kinds.size, 1)), reach[:, :-1]), axis=1)
        return Outlook(kinds, reach, self._class, self._max_len)

    def _add(self, slot: int, place: int) -> None:
        weight = self._weight_of[slot] / _KEPT
        if weight > _MOST_WEIGHT:
            self._counts[slot] /= self._weight[slot]
            weight = 1.0 / _KEPT
        self._weight_of[slot] = weight
        self._count_of[slot, place] = self._count_of[slot, place] + weight

    def _new_slot(self, tenant: str) -> int:
        if len(self._slots) < _TENANTS - 1:
            slot = len(self._slots) + 1
        else:
            _, slot = self._slots.popitem(last=False)  # of the tenant that ended something longest ago
        self._counts[slot], self._weight[slot] = 0.0, 1.0
        self._slots[tenant] = slot
        return slot


class Outlook:
    """Survival of outputs as of one moment. kinds: the slots that it knows, rising."""

    def __init__(self, kinds: Slots, reach: Floats, classes: Slots, max_len: int) -> None:
        self.kinds = kinds
        self._reach = reach
        self._class = classes
        self._max_len = max_len

    def survival(self, slots: Slots, lengths: Ints, ahead: Ints) -> Floats:
        """[horizons, outputs]: how likely each, of its present length, is to get `ahead` tokens further."""
        at = np.searchsorted(self.kinds, slots)
        then = np.minimum(lengths + ahead[:, None], self._max_len)
        share: Floats = self._reach[at, self._class[then]] / self._reach[at, self._class[lengths]]
        return share


def _from_the_end(counts: Floats) -> Floats:
    """How many are in each class or in a later one."""
    return counts[:, ::-1].cumsum(axis=1)[:, ::-1]


def _classes(lengths: npt.NDArray[np.int_]) -> Slots:
    """0 to 16 stand alone; above, `_STEPS` classes for each doubling."""
    rough = 16 + np.floor(_STEPS * np.log2(np.maximum(lengths, 16) / 16))
    return np.where(lengths < 16, lengths, rough).astype(np.intp)
