"""Requests and tokens by tenant, for whoever watches: counted where rows change hands, not where tokens are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from treadle.transport.messages import TenantFigures

from .rows import Rows

MOST_NAMED: Final = 64
NOBODY: Final = "default"
OTHERS: Final = "other"


class TenantTally:
    """What a row has committed is counted when somebody asks or when it is vacated: a step costs nothing.

    The first `MOST_NAMED` tenants have their own figures, all further ones are "other": a client that makes up names
    fills no memory. Who gave no name is "default".
    """

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._names: dict[str, int] = {}
        self._slot = [0] * len(rows.admission)
        self._counted = [0] * len(rows.admission)
        self._prompt: list[int] = []
        self._cached: list[int] = []
        self._generated: list[int] = []
        self._finished: list[int] = []
        self._refused: list[int] = []

    def enter(self, row: int, tenant: str, known: int) -> None:
        """The row begins to be used, by somebody of this tenant that has so many tokens."""
        self._slot[row] = self._slot_of(tenant)
        self._counted[row] = known

    def leave(self, row: int) -> None:
        """The row is about to be vacated."""
        self._generated[self._slot[row]] += self._rows.known_of[row] - self._counted[row]

    def late_token(self, tenant: str) -> None:
        """A token that no row shows: of a sequence that was preempted while it was in flight."""
        self._generated[self._slot_of(tenant)] += 1

    def prompt(self, row: int, tokens: int, cached: int) -> None:
        """The row's prompt begins to be computed; so many of its tokens need not be."""
        slot = self._slot[row]
        self._prompt[slot] += tokens
        self._cached[slot] += cached

    def finish(self, tenant: str) -> None:
        self._finished[self._slot_of(tenant)] += 1

    def refuse(self, tenant: str) -> None:
        self._refused[self._slot_of(tenant)] += 1

    def figures(self, waiting: Mapping[str, int]) -> list[TenantFigures]:
        """Of each tenant that was seen. waiting: continuations by tenant."""
        waits: dict[int, int] = {}
        for tenant, count in waiting.items():
            slot = self._slot_of(tenant)
            waits[slot] = waits.get(slot, 0) + count
        rows, size = self._rows, len(self._names)
        live = rows.admission.nonzero()[0]
        slots = np.array(self._slot, np.intp)[live]
        running = np.bincount(slots, minlength=size).tolist()
        counted = np.array(self._counted, np.int64)[live]
        in_rows = np.bincount(slots, rows.known[live] - counted, size).tolist()
        return [
            TenantFigures(
                name,
                int(running[slot]),
                waits.get(slot, 0),
                self._prompt[slot],
                self._cached[slot],
                self._generated[slot] + int(in_rows[slot]),
                self._finished[slot],
                self._refused[slot],
            )
            for name, slot in self._names.items()
        ]

    def _slot_of(self, tenant: str) -> int:
        name = tenant or NOBODY
        slot = self._names.get(name)
        if slot is not None:
            return slot
        if len(self._names) >= MOST_NAMED:
            slot = self._names.get(OTHERS)
            if slot is not None:
                return slot
            name = OTHERS
        self._names[name] = len(self._names)
        for column in (self._prompt, self._cached, self._generated, self._finished, self._refused):
            column.append(0)
        return self._names[name]
