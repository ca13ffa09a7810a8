"""Where FlashInfer's plans are written on the host and read on the device."""

from __future__ import annotations

import torch
from torch import Tensor

_SLOTS = 4
# A step has a plan of the whole and one of each half.
_PLANS = 3
# Up to this many query tiles are dealt out for each head apart, beyond it for all heads at once; seven int32 each.
_TILES = 4096
_TILE_BYTES = 7 * 4


def plan_bytes(q_heads: int) -> int:
    """Enough for any plan of so many query heads."""
    return (1 << 20) + q_heads * _TILES * _TILE_BYTES


class PlanBuffers:
    """Pinned memory for several plans, and device memory for those of one step.

    A plan is written to pinned memory and copied on the stream of the step that it is for. The device runs behind the
    host, so the next plan must not overwrite that memory until it has been copied; on the device the stream's order
    keeps the plans of different steps apart.
    """

    def __init__(self, device: torch.device, size: int, slots: int = _SLOTS) -> None:
        self._device = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_PLANS)]
        self._turn = 0
        self._pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(slots)]
        self._copied: list[torch.cuda.Event | None] = [None] * slots
        self._next = 0

    def device_memory(self) -> Tensor:
        """For the next plan, until the third one after it."""
        self._turn = (self._turn + 1) % _PLANS
        return self._device[self._turn]

    def take(self) -> Tensor:
        """Pinned memory for the next plan; waits for the copy of the plan that had it, if need be."""
        event = self._copied[self._next]
        if event is not None:
            event.synchronize()
        return self._pinned[self._next]

    def copied(self) -> None:
        """The copy from what `take` gave is on the current stream."""
        event = self._copied[self._next] or torch.cuda.Event()
        event.record()
        self._copied[self._next] = event
        self._next = (self._next + 1) % len(self._pinned)
