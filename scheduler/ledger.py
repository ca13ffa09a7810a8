"""Who was served how much, for policies that want to know."""

from __future__ import annotations

import numpy as np

from .policies.guard import Guard
from .rows import Rows


class Ledger:
    """Tokens of output by lane, counted where the order of the queue is looked at and not where tokens are made.

    A row is charged for what it has committed since it was last looked at: one vector operation for all rows, and
    nothing at all in steps that admit nobody. slot: of each row's lane in `_lanes`.
    """

    def __init__(self, rows: Rows, guard: Guard) -> None:
        self._rows = rows
        self._guard = guard
        self._used = guard.has_charge
        self._slot = np.zeros(len(rows.admission), np.intp)
        self._charged = np.zeros(len(rows.admission), np.int64)
        self._lanes: list[str] = []
        self._users: list[int] = []
        self._slots: dict[str, int] = {}
        self._spare: list[int] = []
        self._owed: dict[str, int] = {}

    def enter(self, row: int, lane: str) -> None:
        """The row begins to be used, by somebody of this lane."""
        if not self._used:
            return
        slot = self._slots.get(lane)
        if slot is None:
            slot = self._slots[lane] = self._new_slot(lane)
        self._users[slot] += 1
        self._slot[row] = slot
        self._charged[row] = self._rows.known[row]

    def leave(self, row: int) -> None:
        """The row is about to be vacated."""
        if not self._used:
            return
        slot = int(self._slot[row])
        self.owe(self._lanes[slot], int(self._rows.known[row] - self._charged[row]))
        self._users[slot] -= 1
        if not self._users[slot]:
            del self._slots[self._lanes[slot]]
            self._spare.append(slot)

    def owe(self, lane: str, tokens: int) -> None:
        """Tokens of output that no row shows any more."""
        if tokens and self._used:
            self._owed[lane] = self._owed.get(lane, 0) + tokens

    def settle(self) -> None:
        """Tells the policy what has been served since the last time."""
        if not self._used:
            return
        rows = self._rows
        live = rows.admission.nonzero()[0]
        new = rows.known[live] - self._charged[live]
        self._charged[live] = rows.known[live]
        sums = np.bincount(self._slot[live], new, len(self._lanes))
        for slot in sums.nonzero()[0].tolist():
            self.owe(self._lanes[slot], int(sums[slot]))
        owed, self._owed = self._owed, {}
        for lane, tokens in owed.items():
            self._guard.charge(lane, 0, tokens)

    def _new_slot(self, lane: str) -> int:
        if self._spare:
            slot = self._spare.pop()
            self._lanes[slot] = lane
            return slot
        self._lanes.append(lane)
        self._users.append(0)
        return len(self._lanes) - 1
