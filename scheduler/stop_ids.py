"""Which sampled tokens deserve a look."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class StopIds:
    """The stop ids of all unfinished requests, counted, as a mask over the vocabulary.

    `mask[tokens]` is one vector operation whatever the number of stop ids; the few tokens that it flags are then
    looked up in the set of their own request. Nearly all requests stop at the same EOS, so the mask hardly changes.
    """

    def __init__(self, vocab_size: int) -> None:
        self.mask: npt.NDArray[np.bool_] = np.zeros(vocab_size, np.bool_)
        self.counts: dict[int, int] = {}

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            count = self.counts.get(token, 0)
            self.counts[token] = count + 1
            if not count:
                self.mask[token] = True

    def remove(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            count = self.counts[token] - 1
            if count:
                self.counts[token] = count
            else:
                del self.counts[token]
                self.mask[token] = False
