"""Masks of guided rows on their way to the device: as they travelled, in one copy, and spread out there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, device

from treadle.engine.kernels.masks import mask_logits_fused, put_words_fused
from treadle.engine.sampling.masks import LocalMasks
from treadle.engine.sampling.upload import upload, upload_pinned

_LARGEST = (1 << 31) - 1


@dataclass(frozen=True, slots=True, eq=False)
class DeviceMasks:
    """places, index: int32 [G]. words: int32 [masks, words]; offset: as `mask_logits_fused` wants them."""

    places: Tensor
    index: Tensor
    words: Tensor
    offset: int

    @classmethod
    def of(cls, masks: LocalMasks, target: device) -> DeviceMasks:
        """The whole of each mask is spread out, also where a rank needs a slice: the device does not notice.

        The ranks wait for masks, and spread out on the host those of 256 rows are 4 MB, to be written twice.
        """
        given = masks.given
        if given.shared:
            places, index = upload(np.stack([masks.places, masks.index]).astype(np.int32), target)
            words = upload_pinned(given.bits.view(np.int32), target)
            return cls(places, index, words[:, masks.first : masks.end], masks.offset)
        if len(given.full) * given.width > _LARGEST:
            raise ValueError(f"{len(given.full)} masks of {given.width} words: the kernel counts up to {_LARGEST}")
        parts = (masks.places, masks.index, -given.full.astype(np.int32), given.where, given.values.view(np.int32))
        whole = (given.whole, given.bits.view(np.int32).reshape(-1))
        packet = np.concatenate([part.astype(np.int32, copy=False) for part in (*parts, *whole)])
        sizes = [len(part) for part in (*parts, *whole)]
        places, index, full, where, values, rows, bits = upload(packet, target).split(sizes)
        words = full[:, None].expand(-1, given.width).contiguous()
        if len(given.whole):
            words.index_copy_(0, rows.long(), bits.view(-1, given.width))
        put_words_fused(words, where, values)
        return cls(places, index, words[:, masks.first : masks.end], masks.offset)

    def apply(self, logits: Tensor) -> None:
        """Changes logits, float [S, vocab_local], in place."""
        mask_logits_fused(logits, self.places, self.index, self.words, self.offset)
