"""How long answers are, learned by tenant while they end."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

OVERALL = 0
_TENANTS = 256
_MEMORY = 256
"""Ends after which one counts a third."""
_PRIOR = 8.0
"""Ends of everybody that a tenant's own are mixed with."""
_FIRST_GUESS = 128
_STEPS = 8
"""Classes per doubling of the length."""

Floats = npt.NDArray[np.float64]


class OutputLengths:
    """For each tenant a histogram of the lengths of finished outputs, in classes of about a tenth, with forgetting.

    What is asked of it is how much is still to come from an output that has reached a certain length: the mean of
    those that got at least as far, less what is there. With long tails that is more the longer it has been going on.
    slot: number of a tenant's statistics; the tenants heard of last have one, the others share that of everybody.
    """

    def __init__(self, max_len: int) -> None:
        lengths = np.arange(max_len + 1)
        self._class = _classes(lengths)
        size = int(self._class[-1]) + 1
        self._counts: Floats = np.zeros((_TENANTS, size))
        self._sums: Floats = np.zeros((_TENANTS, size))
        self._mean: Floats = np.zeros((_TENANTS, size))
        self._middle = np.bincount(self._class, lengths) / np.maximum(np.bincount(self._class), 1)
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._changed: set[int] = set()
        self._add(OVERALL, min(_FIRST_GUESS, max_len))

    def slot(self, tenant: str) -> int:
        return self._slots.get(tenant, OVERALL)

    def note(self, tenant: str, length: int) -> None:
        """An output of the tenant has ended by itself, with so many tokens."""
        slot = self._slots.get(tenant)
        if slot is None:
            slot = self._new_slot(tenant)
        self._slots.move_to_end(tenant)
        for number in (OVERALL, slot):
            self._add(number, length)

    def remaining(self, slots: npt.NDArray[np.intp], lengths: npt.NDArray[np.int32]) -> Floats:
        """Tokens still to come of outputs that have these lengths."""
        for slot in self._changed:
            self._renew(slot)
        self._changed.clear()
        mean: Floats = self._mean[slots, self._class[lengths]]
        return np.maximum(mean - lengths, 1.0)

    def _add(self, slot: int, length: int) -> None:
        self._counts[slot] *= 1 - 1 / _MEMORY
        self._sums[slot] *= 1 - 1 / _MEMORY
        at = self._class[length]
        self._counts[slot, at] += 1
        self._sums[slot, at] += length
        self._changed.add(slot)

    def _renew(self, slot: int) -> None:
        """The mean length of those that reach each class. Past the longest ever seen: as long again."""
        counts, sums = self._counts[slot], self._sums[slot]
        if slot != OVERALL:
            share = _PRIOR / self._counts[OVERALL].sum()
            counts, sums = counts + share * self._counts[OVERALL], sums + share * self._sums[OVERALL]
        reach, total = counts[::-1].cumsum()[::-1], sums[::-1].cumsum()[::-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            self._mean[slot] = np.where(reach > 1e-3, total / reach, 2 * self._middle)

    def _new_slot(self, tenant: str) -> int:
        if len(self._slots) < _TENANTS - 1:
            slot = len(self._slots) + 1
        else:
            _, slot = self._slots.popitem(last=False)  # of the tenant that ended something longest ago
        self._counts[slot] = self._sums[slot] = 0.0
        self._slots[tenant] = slot
        return slot


def _classes(lengths: npt.NDArray[np.int_]) -> npt.NDArray[np.intp]:
    """0 to 16 stand alone; above, `_STEPS` classes for each doubling."""
    rough = 16 + np.floor(_STEPS * np.log2(np.maximum(lengths, 16) / 16))
    return np.where(lengths < 16, lengths, rough).astype(np.intp)
