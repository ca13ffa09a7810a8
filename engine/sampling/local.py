"""What one rank computes on its own slice of the vocabulary: the interface, and the implementation in torch.

The torch one runs on any device without asking it anything, so a GPU never waits for the host. CPUs have their own in
`local_cpu`, several times as quick there; both give the same tokens.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from .filters import NAN_KEY, PAD, UNITS, encode
from .noise import fold, gumbel, hash_ids
from .upload import upload, upload_column

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


class LocalOps(Protocol):
    """logits: float32 [S, vocab_local]. which: the s rows of them that are meant. Results lie on the logits' device."""

    def greedy(self, logits: torch.Tensor, which: Int64) -> torch.Tensor:
        """float64 [s, 2]: the largest logit and its token id, the lowest of equals; NaN if there is one."""
        ...

    def perturbed(self, logits: torch.Tensor, which: Int64, temperature: Float64, keys: Int64) -> torch.Tensor:
        """float64 [s, 2]: the largest logit / temperature + noise, and its id. keys: int64 [s, 2]."""
        ...

    def winner(self, every: torch.Tensor) -> torch.Tensor:
        """float64 [world, s, 2] to [s, 2]: the highest score, the lowest id of equals. A NaN wins."""
        ...

    def candidates(self, logits: torch.Tensor, which: Int64, count: int) -> torch.Tensor:
        """int64 [s, count]: the best of the slice in any order, padded; a row with a NaN has NAN_KEY among them."""
        ...

    def units(
        self, logits: torch.Tensor, which: Int64, peak: torch.Tensor, temperature: Float64, least: Float64
    ) -> torch.Tensor:
        """float64 [s]: the slice's mass in whole units, tokens below `least` units left out. peak: float64 [s]."""
        ...

    def at_least(self, logits: torch.Tensor, which: Int64, values: torch.Tensor) -> torch.Tensor:
        """int64 [s]: how many logits of the slice are not below values, float32 [s]."""
        ...

    def best_first(self, candidates: torch.Tensor) -> torch.Tensor:
        """int64 [s, c], each row sorted."""
        ...


class TorchOps:
    """On any device."""

    def __init__(self, vocab_start: int, vocab_local: int, device: torch.device) -> None:
        self._ids = torch.arange(vocab_start, vocab_start + vocab_local, dtype=torch.int64, device=device)
        self._folded = fold(self._ids)

    def greedy(self, logits: torch.Tensor, which: Int64) -> torch.Tensor:
        return self._best(_take(logits, which))

    def perturbed(self, logits: torch.Tensor, which: Int64, temperature: Float64, keys: Int64) -> torch.Tensor:
        key = upload(keys, logits.device)
        noise = gumbel(hash_ids(self._folded, key[:, :1], key[:, 1:]))
        return self._best(_take(logits, which).double() / upload_column(temperature, logits.device) + noise)

    def _best(self, scores: torch.Tensor) -> torch.Tensor:
        if not self._ids.numel():
            return _nothing(len(scores)).to(scores.device)
        best = scores.amax(-1, keepdim=True)
        ids = torch.where(scores == best, self._ids, 1 << 62).amin(-1, keepdim=True)
        return torch.cat([best.double(), ids.double()], dim=-1)

    def winner(self, every: torch.Tensor) -> torch.Tensor:
        score = every[..., 0].amax(0)
        ids = torch.where(every[..., 0] == score, every[..., 1], float("inf")).amin(0)
        return torch.stack([score, ids], dim=1)

    def candidates(self, logits: torch.Tensor, which: Int64, count: int) -> torch.Tensor:
        part = _take(logits, which)
        keys = torch.where(part.isnan(), NAN_KEY, encode(part, self._ids.expand_as(part)))
        keys = keys.topk(min(count, keys.shape[1]), dim=-1).values
        return torch.nn.functional.pad(keys, (0, count - keys.shape[1]), value=PAD)

    def units(
        self, logits: torch.Tensor, which: Int64, peak: torch.Tensor, temperature: Float64, least: Float64
    ) -> torch.Tensor:
        rate = upload_column((1.0 / temperature).astype(np.float32), logits.device)
        part = (_take(logits, which) - peak.float().unsqueeze(1)) * rate
        part = part.exp_().mul_(UNITS).round_()
        return (part * (part >= upload_column(least.astype(np.float32), logits.device))).sum(-1, dtype=torch.float64)

    def at_least(self, logits: torch.Tensor, which: Int64, values: torch.Tensor) -> torch.Tensor:
        return (_take(logits, which) >= values.unsqueeze(1)).sum(-1)

    def best_first(self, candidates: torch.Tensor) -> torch.Tensor:
        return candidates.sort(dim=-1, descending=True).values


def _take(logits: torch.Tensor, which: Int64) -> torch.Tensor:
    if len(which) == len(logits):
        return logits
    return logits.index_select(0, upload(which, logits.device))


def _nothing(rows: int) -> torch.Tensor:
    return torch.tensor([[float("-inf"), 0.0]], dtype=torch.float64).expand(rows, 2).contiguous()
