"""One request of a workload."""

from __future__ import annotations

import msgspec


class Offer(msgspec.Struct, frozen=True, gc=False):
    """A request when it arrives. prompt: int32 bytes. The others are its row of the `Workload`."""

    arrival: float
    outputs: int
    tenant: int
    priority: int
    timeout: float
    prompt: bytes
