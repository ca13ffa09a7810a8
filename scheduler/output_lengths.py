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
Ints = npt.NDArray[np.int32]


class OutputLengths:
    """For each tenant a histogram of the lengths of finished outputs, in classes of about a tenth, with forgetting.

    What is asked of it is how likely an output that has reached a certain length is to go on so much longer: the share
    of those that got at least as far. With long tails that is likelier the longer it has been going on.
    slot: number of a tenant's statistics; the tenants heard of last have one, the others share that of everybody.
    """

    def __init__(self, max_len: int) -> None:
        self._max_len = max_len
        self._class = _classes(np.arange(max_len + 1))
        size = int(self._class[-1]) + 1
        self._counts: Floats = np.zeros((_TENANTS, size))
        self._reach: Floats = np.zeros((_TENANTS, size))
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

    def survival(self, slots: npt.NDArray[np.intp], lengths: Ints, ahead: Ints) -> Floats:
        """[horizons, outputs]: how likely each, of its present length, is to get `ahead` tokens further."""
        for slot in self._changed:
            self._renew(slot)
        self._changed.clear()
        then = np.minimum(lengths + ahead[:, None], self._max_len)
        share: Floats = self._reach[slots, self._class[then]] / self._reach[slots, self._class[lengths]]
        return share

    def _add(self, slot: int, length: int) -> None:
        self._counts[slot] *= 1 - 1 / _MEMORY
        self._counts[slot, self._class[length]] += 1
        self._changed.add(slot)

    def _renew(self, slot: int) -> None:
        """How many reach each class. Beyond the longest ever seen: half as many with each doubling."""
        counts = self._counts[slot]
        if slot != OVERALL:
            counts = counts + _PRIOR / self._counts[OVERALL].sum() * self._counts[OVERALL]
        reach = counts[::-1].cumsum()[::-1]
        tail = 0.5 ** (np.arange(reach.size) / _STEPS) * 1e-3
        self._reach[slot] = reach + tail * counts.sum()

    def _new_slot(self, tenant: str) -> int:
        if len(self._slots) < _TENANTS - 1:
            slot = len(self._slots) + 1
        else:
            _, slot = self._slots.popitem(last=False)  # of the tenant that ended something longest ago
        self._counts[slot] = 0.0
        self._slots[tenant] = slot
        return slot


def _classes(lengths: npt.NDArray[np.int_]) -> npt.NDArray[np.intp]:
    """0 to 16 stand alone; above, `_STEPS` classes for each doubling."""
    rough = 16 + np.floor(_STEPS * np.log2(np.maximum(lengths, 16) / 16))
    return np.where(lengths < 16, lengths, rough).astype(np.intp)
