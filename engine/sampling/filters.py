"""Candidates and filters. A candidate is one int64 that sorts by logit, then by lowest token id.

High word: the bits of the float32 logit, mapped so that integers order as floats do. Low word: 2^31 - 1 less the id.
So "the k best, ties by lowest id" is plain integer selection, exact and the same however the vocabulary is cut.

Probability is counted in whole units of 2^-34 of the most likely token's, in float64. Sums of whole numbers below 2^53
are exact in any order, so the mass of a vocabulary of up to 2^18 tokens does not depend on how it is cut either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNITS = 2.0**34
ID_TOP = 0x7FFFFFFF
PAD = -(1 << 63)
"""A place with no candidate: below every candidate."""
NAN_KEY = (0x7FC00000 << 32) | ID_TOP
"""Says that the row holds a NaN: above every candidate."""


def encode(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 logits and int64 ids of one shape to int64 candidates. NaN is not allowed."""
    bits = (logits + 0.0).view(torch.int32)  # adding zero makes -0.0 and 0.0 one value
    ordered = bits ^ ((bits >> 31) & ID_TOP)
    return (ordered.to(torch.int64) << 32) | (ID_TOP - ids)


def decode(candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 candidates to float32 logits and int64 ids. A PAD gives -inf."""
    ordered = (candidates >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & ID_TOP)
    logits = bits.view(torch.float32).masked_fill(candidates == PAD, float("-inf"))
    return logits, ID_TOP - (candidates & ID_TOP)


def mass(logits: torch.Tensor, peak: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Units of each candidate, whole numbers in float64: exp((logit - peak) / temperature). Shapes broadcast."""
    return torch.exp((logits.double() - peak.double()) / temperature).mul_(UNITS).round_()


@dataclass(frozen=True)
class Filters:
    """Of each row, [s, 1] on the device. top_k: int64, vocab_size for none. top_p, min_p, temperature: float64."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    has_top_k: torch.Tensor


def keep_mask(
    candidates: torch.Tensor, floor: torch.Tensor, total: torch.Tensor, filters: Filters
) -> tuple[torch.Tensor, torch.Tensor]:
    """What survives min-p, top-k and top-p, in this order, bool [s, c], and which rows are decided, bool [s].

    candidates: int64 [s, c], best first. floor: int64 [s, 1]; every token of the vocabulary at or above it is among the
    candidates, those below it may lack neighbours. total: float64 [s, 1], units of the whole vocabulary after min-p
    (not used for rows with top-k, whose total is that of what top-k keeps). A row is decided when a candidate above the
    floor was rejected: all filters keep a prefix of the order, so nothing below can be kept.
    Each filter renormalises what the one before left, as in vLLM; a token is kept by top-p when the tokens before it
    hold less than top_p of the mass.
    """
    logits, _ = decode(candidates)
    units = mass(logits, logits[:, :1], filters.temperature)
    known = (candidates >= floor) & (candidates != PAD)
    order = torch.arange(candidates.shape[1], device=candidates.device)
    keep = known & (order < filters.top_k) & (units >= filters.min_p * UNITS)
    units = units * keep
    total = torch.where(filters.has_top_k, units.sum(-1, keepdim=True), total)
    before = units.cumsum(-1) - units
    limit = torch.where(filters.top_p >= 1, float("inf"), filters.top_p * total)
    keep &= before < limit
    kept = keep.sum(-1)
    decided = (kept < known.sum(-1)) | (kept >= filters.top_k.squeeze(1))
    return keep, decided
