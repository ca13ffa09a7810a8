"""Masks of guided rows on a rank's slice of the logits: what is not allowed becomes minus infinity."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from treadle.errors import ProtocolError
from treadle.transport.codec import unpack
from treadle.transport.mask_pages import MaskPages
from treadle.transport.masks import ANYTHING, GivenMasks, read_masks
from treadle.transport.messages import Masks, StepPlan

from .upload import upload

Int64 = npt.NDArray[np.int64]
_NEVER = float("-inf")
_FEW = 16
"""One token in so many, or less, is few."""


@dataclass(frozen=True, slots=True)
class LocalMasks:
    """Of the rows that have one. On the host.

    places: int64 [G], which rows of the logits these are. index: int64 [G], which mask each of them has. given: masks
    of the whole vocabulary. first, end: their words that hold this rank's slice, whose column c is bit c + offset,
    counted from the lowest bit of the word `first`.
    """

    places: Int64
    index: Int64
    given: GivenMasks
    first: int
    end: int
    offset: int

    @classmethod
    def of(
        cls,
        masks: Masks,
        places: Int64,
        vocab_start: int,
        vocab_local: int,
        vocab_size: int,
        pages: MaskPages | None = None,
    ) -> LocalMasks:
        """places: of all guided rows of the plan, in its order. pages: where masks are that were not sent. Raises
        ProtocolError."""
        given = read_masks(masks, len(places), vocab_size, pages)
        bound = np.flatnonzero(given.rows != ANYTHING)
        first, end = vocab_start // 32, -(-(vocab_start + vocab_local) // 32)
        return cls(places[bound], given.rows[bound].astype(np.int64), given, first, end, vocab_start % 32)

    def words(self) -> npt.NDArray[np.int32]:
        """int32 [masks, end - first], each of this rank's slice."""
        return np.ascontiguousarray(self.given.words()[:, self.first : self.end]).view(np.int32)

    def among(self, rows: Int64) -> LocalMasks:
        """The same where only these rows of the logits, ascending, are left; all that have a mask are among them."""
        return replace(self, places=np.searchsorted(rows, self.places))


def guided_places(plan: StepPlan, sampled: Int64) -> Int64:
    """Where the plan's guided rows stand among the rows that sample, all of which are in `sampled`.

    Raises ProtocolError for one that does not sample.
    """
    rows = unpack(plan.guided).astype(np.int64)
    order = np.argsort(sampled, kind="stable")
    found = np.searchsorted(sampled, rows, sorter=order)
    places = order[np.minimum(found, len(order) - 1)] if len(order) else rows - 1
    if not len(order) or (sampled[places] != rows).any():
        raise ProtocolError(f"step {plan.step}: guided rows {rows.tolist()} that do not sample")
    return places.astype(np.int64)


def mask_logits(logits: torch.Tensor, masks: LocalMasks) -> None:
    """Changes logits, float [S, vocab_local], in place."""
    if not len(masks.places) or not logits.shape[1]:
        return
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        _mask_on_host(logits, masks)
    else:
        _mask_on_device(logits, masks)


def _mask_on_host(logits: torch.Tensor, masks: LocalMasks) -> None:
    """A mask at a time, so that its bits are spread out once for all its rows.

    Most masks allow a handful of tokens or forbid a few hundred: these are named, which is several times as quick as
    to go through the vocabulary.
    """
    columns, values, words = logits.shape[1], logits.numpy(), masks.words()
    for mask in np.unique(masks.index):
        bits = np.unpackbits(words[mask].view(np.uint8), bitorder="little")
        allowed = bits[masks.offset :][:columns].view(np.bool_)
        count = int(np.count_nonzero(allowed))
        rows = [values[place] for place in masks.places[masks.index == mask]]
        if count < columns // _FEW:
            ids = allowed.nonzero()[0]
            for row in rows:
                kept = row[ids]
                row.fill(_NEVER)
                row[ids] = kept
        elif columns - count < columns // _FEW:
            ids = (~allowed).nonzero()[0]
            for row in rows:
                row[ids] = _NEVER
        else:
            for row in rows:
                np.copyto(row, _NEVER, where=~allowed)


def _mask_on_device(logits: torch.Tensor, masks: LocalMasks) -> None:
    """Without waiting for the device. The way without Triton; `cuda.masks` is the fast one."""
    device = logits.device
    words, index, places = (upload(array, device) for array in (masks.words(), masks.index, masks.places))
    bit = torch.arange(logits.shape[1], device=device) + masks.offset
    allowed = (words[index][:, bit >> 5] >> (bit & 31).int()) & 1
    logits[places] = logits[places].masked_fill(allowed == 0, _NEVER)
