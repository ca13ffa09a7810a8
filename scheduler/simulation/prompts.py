"""What comes to a replica, one request after the other, with made-up prompts: cheap, the same for the same request, and
equal only where requests share a prefix."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from treadle.transport.codec import pack

from .offer import Offer
from .workload import Workload

_POOL: Final = 1 << 18
_NAME: Final = struct.Struct("<2i")
_STRIDE: Final = 7919
"""A prime, so that the slices of neighbours begin far from each other."""
_AT_ONCE: Final = 4096
"""Rows of the columns that are Python objects at a time."""


def offers(workload: Workload, vocab_size: int) -> Iterator[Offer]:
    """The requests in their order, each made when it is asked for."""
    made, real = _Prompts(workload, vocab_size), workload.prompts
    for begin in range(0, len(workload), _AT_ONCE):
        columns = {name: column[begin : begin + _AT_ONCE].tolist() for name, column in workload.columns().items()}
        prompts: Iterable[bytes]
        if real is not None:
            prompts = real[begin : begin + _AT_ONCE]
        else:
            prompts = map(made.text, *(columns[name] for name in ("number", "inputs", "prefix", "prefix_tokens")))
        others = (columns[name] for name in ("arrival", "outputs", "tenant", "priority", "timeout"))
        yield from map(Offer, *others, prompts)


class _Prompts:
    """A prompt is its prefix, two tokens that name the request, and a slice of random tokens.

    The naming tokens make the block they are in unique, and the prefix cache finds a block only behind its
    predecessors, so two requests never seem to share more than their prefix.
    """

    def __init__(self, workload: Workload, vocab_size: int) -> None:
        self._vocab = vocab_size
        longest = int(workload.inputs.max(initial=1))
        random = np.random.Generator(np.random.PCG64(1))
        self._pool = pack(random.integers(0, vocab_size, _POOL + longest))

    def text(self, number: int, length: int, prefix: int, shared: int) -> bytes:
        """Of request `number`, which begins with `shared` tokens of a prefix. int32 bytes."""
        own = self._beginning(2 * number, length - shared)
        return self._beginning(2 * prefix + 1, shared) + own if shared else own

    def _beginning(self, name: int, length: int) -> bytes:
        """Every name has a text without end; this is its beginning."""
        head = _NAME.pack(name % self._vocab, name // self._vocab % self._vocab)
        at = name * _STRIDE % _POOL * 4
        return (head + self._pool[at : at + max(0, 4 * length - _NAME.size)])[: 4 * length]
