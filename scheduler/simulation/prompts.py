"""Made-up prompts: cheap, the same for the same request, and equal only where requests share a prefix."""

from __future__ import annotations

import struct

import numpy as np

from treadle.transport.codec import pack

from .workload import Workload

_POOL = 1 << 18
_NAME = struct.Struct("<2i")
_STRIDE = 7919
"""A prime, so that the slices of neighbours begin far from each other."""


class Prompts:
    """A prompt is its prefix, two tokens that name the request, and a slice of random tokens.

    The naming tokens make the block they are in unique, and the prefix cache finds a block only behind its
    predecessors, so two requests never seem to share more than their prefix.
    """

    def __init__(self, workload: Workload, vocab_size: int) -> None:
        self._real = workload.prompts
        self._numbers = workload.number.tolist()
        self._inputs = workload.inputs.tolist()
        self._prefixes = workload.prefix.tolist()
        self._shared = workload.prefix_tokens.tolist()
        self._vocab = vocab_size
        longest = int(workload.inputs.max(initial=1))
        random = np.random.Generator(np.random.PCG64(1))
        self._pool = pack(random.integers(0, vocab_size, _POOL + longest))

    def __getitem__(self, index: int) -> bytes:
        """int32 bytes."""
        if self._real is not None:
            return self._real[index]
        length, shared, prefix = self._inputs[index], self._shared[index], self._prefixes[index]
        own = self._text(2 * self._numbers[index], length - shared)
        return self._text(2 * prefix + 1, shared) + own if shared else own

    def _text(self, name: int, length: int) -> bytes:
        """Every name has a text without end; this is its beginning."""
        head = _NAME.pack(name % self._vocab, name // self._vocab % self._vocab)
        at = name * _STRIDE % _POOL * 4
        return (head + self._pool[at : at + 4 * length])[: 4 * length]
