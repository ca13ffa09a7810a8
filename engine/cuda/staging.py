"""Numbers from the host to the device, many in one copy, without waiting: pinned buffers in a ring.

A buffer is filled, its copy is queued on the current stream, and it is filled again a few turns later. The device side
is one buffer: whatever reads it was queued before the next copy, so stream order keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Kernels are compiled for addresses that divide by 16: four int32 words.
_ALIGN = 4
Words = npt.NDArray[np.int32]
Array = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def aligned(words: int) -> int:
    return -(-words // _ALIGN) * _ALIGN


@dataclass(frozen=True, slots=True)
class Field:
    """An array in a packet. wide: int64, else int32."""

    length: int
    wide: bool


class Layout:
    """Where each array of a packet lies. base: the words before the first, aligned. end: the words up to its end."""

    def __init__(self, fields: Sequence[Field], base: int = 0) -> None:
        self._places: list[tuple[int, int, bool]] = []
        for field in fields:
            words = field.length * (2 if field.wide else 1)
            self._places.append((base, base + words, field.wide))
            base = aligned(base + words)
        self.end = base

    def host(self, words: Words) -> list[Array]:
        """The arrays in a host buffer, to be filled."""
        return [words[a:b].view(np.int64) if wide else words[a:b] for a, b, wide in self._places]

    def device(self, words: Tensor) -> list[Tensor]:
        """The same arrays in the device's buffer, int64 or int32."""
        return [words[a:b].view(torch.int64) if wide else words[a:b] for a, b, wide in self._places]


class Staging:
    """words: int32 elements of each buffer. turns: buffers; as many copies may be on their way."""

    def __init__(self, words: int, turns: int, device: torch.device) -> None:
        self.words = aligned(words)
        cuda = device.type == "cuda"
        self._host = torch.zeros((turns, self.words), dtype=torch.int32, pin_memory=cuda)
        self._arrays: list[Words] = list(self._host.numpy())
        self._events = [torch.cuda.Event(blocking=True) for _ in range(turns)] if cuda else []
        self._turn = 0
        self.device = torch.zeros(self.words, dtype=torch.int32, device=device)

    @property
    def turn(self) -> int:
        """Which buffer `take` gave last."""
        return self._turn

    def take(self) -> Words:
        """The next buffer, once its last copy is done (it was queued `turns` copies ago)."""
        self._turn = (self._turn + 1) % len(self._arrays)
        if self._events:
            self._events[self._turn].synchronize()
        return self._arrays[self._turn]

    def send(self, words: int) -> None:
        """Queues the copy of the taken buffer's first `words`."""
        self.device[:words].copy_(self._host[self._turn, :words], non_blocking=True)
        if self._events:
            self._events[self._turn].record()
