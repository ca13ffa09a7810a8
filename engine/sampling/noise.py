"""Randomness by counter: the noise of a token is a function of (seed, position, token id) and of nothing else.

The idea is that of counter-based generators (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as
1, 2, 3"): there is no stream to advance, so neither the batch, the rank nor a restart can change what a request draws.
It is done in two layers. A strong 64-bit hash makes a key of (seed, position): SplitMix64's output function (Steele,
Lea and Flood 2014, "Fast splittable pseudorandom number generators") applied twice. A cheap 32-bit hash makes a number
of (key, token id): a multiply-xorshift finaliser with the constants of lowbias32 (Wellons 2018, "Prospecting for hash
functions"), into which the key enters before both multiplications. It costs eight vector operations for each token.

A number h becomes u = (h + 1/2) / 2^32 and then Gumbel noise g = -log(-log(1 - u)), in float64. The largest values of
g come from small u, where u keeps its full relative precision. Integers are exact on every device; the logarithms of
two devices may differ in the last of 53 bits, which could change a token only where two scores agree to 15 digits.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Words = TypeVar("Words", int, Int64, torch.Tensor)

MUL_1 = 0x7FEB352D
MUL_2 = 0x846CA68B
_LOW = 0xFFFFFFFF
_WEYL = np.uint64(0x9E3779B97F4A7C15)
_STAFFORD_1 = np.uint64(0xBF58476D1CE4E5B9)
_STAFFORD_2 = np.uint64(0x94D049BB133111EB)


def _mix64(x: UInt64) -> UInt64:
    x = (x ^ (x >> np.uint64(30))) * _STAFFORD_1
    x = (x ^ (x >> np.uint64(27))) * _STAFFORD_2
    return x ^ (x >> np.uint64(31))


def seed_base(seeds: UInt64) -> UInt64:
    """The half of a key that the seed alone decides, uint64 [S]."""
    return _mix64(np.atleast_1d(seeds) + _WEYL)


def noise_keys(seeds: UInt64, positions: Int64) -> Int64:
    """uint64 [S] and int64 [S] to keys, int64 [S, 2], each word in [0, 2^32). `positions`: of the token to be drawn."""
    base = seed_base(seeds)
    key = _mix64(base + (np.atleast_1d(positions).astype(np.uint64) + np.uint64(1)) * _WEYL)
    return np.stack([key & np.uint64(_LOW), key >> np.uint64(32)], axis=-1).astype(np.int64)


def fold(ids: Words) -> Words:
    """The part of the hash that does not depend on the key: int64 token ids to int64 words."""
    return ids ^ (ids >> 16)


def hash_ids(folded: Words, key_0: Words, key_1: Words) -> Words:
    """int64 words in [0, 2^32), ints, numpy or torch, broadcast; a bijection of the id for any one key."""
    x = ((folded ^ key_0) * MUL_1) & _LOW
    x = x ^ (x >> 15) ^ key_1
    x = (x * MUL_2) & _LOW
    return x ^ (x >> 16)


def gumbel(words: torch.Tensor) -> torch.Tensor:
    """int64 words in [0, 2^32) to Gumbel(0, 1) noise, float64, in about (-3.1, 22.9)."""
    uniform = (words.to(torch.float64) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform))


def gumbel_np(words: Int64) -> npt.NDArray[np.float64]:
    """The same in numpy."""
    result: npt.NDArray[np.float64] = -np.log(-np.log1p(-((words + 0.5) * 2.0**-32)))
    return result
