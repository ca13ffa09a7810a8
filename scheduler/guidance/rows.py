"""A matcher for each guided sequence, from its first mask to its end.

Only committed tokens reach a matcher, and these are never taken back: so it outlives preemptions and engine groups, and
is made anew from the committed tokens where there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np

from treadle.errors import RequestFailed, Unsatisfiable
from treadle.scheduler.request import Request, Sequence
from treadle.transport.mask_pages import MaskPages
from treadle.transport.masks import Words, encode_masks, shared_masks, words_for
from treadle.transport.messages import Masks

from .matching import Advance, Grammar, Matcher, Matching
from .pending import MasksDue


@dataclass(slots=True)
class _Place:
    """seen: output tokens that the matcher has got, or will have once the jobs made so far have run."""

    grammar: Grammar
    matcher: Matcher | None = None
    seen: int = 0


@dataclass(frozen=True, slots=True)
class MadeMasks:
    """failed: sequences whose grammar cannot go on, and why; their rows may sample anything, for nobody will see it.

    code: of the error with which they end: the request's own, or ours.
    """

    masks: Masks
    failed: list[tuple[Sequence, str]]
    code: str = Unsatisfiable.code


class MaskMemory:
    """Words of one step's masks at a time. Fresh memory of their size comes from the system page by page, which takes
    the threads that fill it a part of the time that they have."""

    def __init__(self) -> None:
        self._words: Words = np.empty((0, 0), np.uint32)

    def take(self, rows: int, width: int) -> Words:
        """uint32 [rows, width] of any values, until the next call."""
        if len(self._words) < rows or self._words.shape[1] != width:
            self._words = np.empty((rows, width), np.uint32)
        return self._words[:rows]


@dataclass(frozen=True, slots=True)
class MaskJob:
    """The masks of one step, to be made on any thread; jobs run one at a time, in the order in which they were made."""

    step: int
    size: int
    places: list[tuple[int, Sequence, _Place, list[int]]]

    def run(
        self, matching: Matching, memory: MaskMemory, begun: Callable[[], None], pages: MaskPages | None = None
    ) -> MadeMasks:
        """begun: see `Matching.advance`. pages: that the ranks have, too; without them masks are sent."""
        width = words_for(matching.vocab_size)
        if pages is not None and (pages.width != width or pages.rows < self.size):
            pages = None
        # Of free rows nobody reads them.
        words = memory.take(self.size, width) if pages is None else pages.words(self.step, self.size)
        free = np.ones(self.size, np.bool_)
        free[[row for row, *_ in self.places]] = False
        errors = matching.advance([_advance(*place) for place in self.places], words, begun)
        free[list(errors)] = True
        masks = encode_masks(self.step, words, free) if pages is None else shared_masks(self.step, free)
        return MadeMasks(masks, [(sequence, errors[row]) for row, sequence, *_ in self.places if row in errors])

    def fail(self, matching: Matching, message: str) -> MadeMasks:
        """What to send when `run` raised: the step must go on for the others."""
        words = np.zeros((self.size, words_for(matching.vocab_size)), np.uint32)
        masks = encode_masks(self.step, words, np.ones(self.size, np.bool_))
        return MadeMasks(masks, [(sequence, message) for _, sequence, *_ in self.places], RequestFailed.code)


class GuidedRows:
    """All matchers. Its methods run on the loop; what they return runs elsewhere."""

    def __init__(self) -> None:
        self._places: dict[Sequence, _Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def begin(self, request: Request, grammar: Grammar) -> None:
        for sequence in request.sequences:
            if not sequence.finish:  # of a journal's request some may have ended, or all while its grammar was compiled
                self._places[sequence] = _Place(grammar)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. One that was never guided is no error."""
        self._places.pop(sequence, None)

    def job(self, due: MasksDue) -> MaskJob:
        places: list[tuple[int, Sequence, _Place, list[int]]] = []
        for row, sequence in enumerate(due.sequences):
            place = None if sequence is None else self._places.get(sequence)
            if sequence is None or place is None:
                continue
            tokens = due.output(row, place.seen)
            place.seen += len(tokens)
            places.append((row, sequence, place, tokens))
        return MaskJob(due.step, len(due.sequences), places)


def _advance(row: int, _: Sequence, place: _Place, tokens: Ordered[int]) -> Advance:
    if place.matcher is None:
        place.matcher = place.grammar.start()
    return Advance(place.matcher, tokens, row)
