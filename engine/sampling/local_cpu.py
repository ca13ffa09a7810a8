"""The work on a rank's slice, on CPUs: numpy on views of the tensors, one row at a time, so that a row stays in cache.

Two tricks carry it. Noise: the winner of logit / temperature + noise needs exact logarithms for itself only. A float's
bit pattern, read as an integer, is a piecewise linear log2 from below, so two subtractions bound every score from
above; those that reach the exact score of the best bound (about two) are computed exactly. Top k: the maxima of
strided columns give a lower bound of the k-th largest that leaves little more than k tokens to select from.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from .filters import ID_TOP, NAN_KEY, PAD, UNITS
from .noise import MUL_1, MUL_2, fold, gumbel_np, hash_ids

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_UNIT = math.log(2.0) / (1 << 23)
"""What one step of a float32's bit pattern is worth in the logarithm."""
_BITS_OF_2_32 = (127 + 32) << 23


class CpuOps:
    """See `local.LocalOps`. Holds scratch for one row: not for two threads at once."""

    def __init__(self, vocab_start: int, vocab_local: int) -> None:
        self._start = vocab_start
        self._ids = np.arange(vocab_start, vocab_start + vocab_local, dtype=np.int64)
        self._folded = fold(self._ids)
        self._folded_32 = self._folded.astype(np.uint32)
        self._words = np.empty(vocab_local, np.uint32)
        self._shifted = np.empty(vocab_local, np.uint32)
        self._floats = np.empty(vocab_local, np.float32)
        self._bounds = np.empty(vocab_local, np.float32)

    def greedy(self, logits: torch.Tensor, which: Int64) -> torch.Tensor:
        values = _view(logits)
        out = np.empty((len(which), 2), np.float64)
        if not values.shape[1]:
            out[:] = (-np.inf, 0.0)
        elif len(which) == len(values):
            best = values.argmax(axis=-1)
            out[:, 0] = values[which, best]
            out[:, 1] = best + self._start
        else:
            for i, row in enumerate(which):
                top = values[row].argmax()
                out[i] = values[row, top], top + self._start
        return torch.from_numpy(out)

    def perturbed(self, logits: torch.Tensor, which: Int64, temperature: Float64, keys: Int64) -> torch.Tensor:
        values = _view(logits)
        out = np.full((len(which), 2), (-np.inf, 0.0))
        if values.shape[1]:
            with np.errstate(over="ignore", invalid="ignore"):
                for i, row in enumerate(which):
                    out[i] = self._perturbed(values[row], float(temperature[i]), keys[i])
        return torch.from_numpy(out)

    def _perturbed(self, row: Float32, temperature: float, key: Int64) -> tuple[float, float]:
        peak = float(row.max())
        if not math.isfinite(peak):
            return peak, float(self._start)
        bounds = self._bound(row, temperature, key)
        likely = int(bounds.argmax())
        score = float(row[likely]) / temperature + self._noise_of(likely, key)
        # The slack covers float32 rounding of the bound, which grows with the size of the scaled logits.
        slack = 1e-3 + 1e-6 * abs(peak) / temperature
        places = np.flatnonzero(bounds >= np.float32((score - slack) / _UNIT - _BITS_OF_2_32))
        place, score = self._exact(row, places, temperature, key)
        return score, float(place + self._start)

    def _bound(self, row: Float32, temperature: float, key: Int64) -> Float32:
        """(score - a constant) / _UNIT, or more, of each token: noise is below -log(u), that is below this log2."""
        words, shifted = self._hash(key), self._shifted
        np.copyto(self._floats, words, casting="unsafe")
        np.copyto(shifted.view(np.float32), self._floats.view(np.int32), casting="unsafe")
        np.multiply(row, np.float32(1.0 / (temperature * _UNIT)), out=self._bounds)
        return np.subtract(self._bounds, shifted.view(np.float32), out=self._bounds)

    def _hash(self, key: Int64) -> npt.NDArray[np.uint32]:
        """`noise.hash_ids` of the whole slice, in 32-bit words and in place."""
        words, shifted = self._words, self._shifted
        np.bitwise_xor(self._folded_32, np.uint32(key[0]), out=words)
        np.multiply(words, np.uint32(MUL_1), out=words)
        np.right_shift(words, np.uint32(15), out=shifted)
        np.bitwise_xor(words, shifted, out=words)
        np.bitwise_xor(words, np.uint32(key[1]), out=words)
        np.multiply(words, np.uint32(MUL_2), out=words)
        np.right_shift(words, np.uint32(16), out=shifted)
        return np.bitwise_xor(words, shifted, out=words)

    def _noise_of(self, place: int, key: Int64) -> float:
        """One token's noise, for a bound: it may differ from `gumbel_np` in the last bit."""
        word = hash_ids(int(self._folded[place]), int(key[0]), int(key[1]))
        return -math.log(-math.log1p(-(word + 0.5) * 2.0**-32))

    def _exact(self, row: Float32, places: Int64, temperature: float, key: Int64) -> tuple[int, float]:
        noise = gumbel_np(hash_ids(self._folded[places], key[:1], key[1:]))
        scores = row[places].astype(np.float64) / temperature + noise
        best = int(scores.argmax())
        return int(places[best]), float(scores[best])

    def winner(self, every: torch.Tensor) -> torch.Tensor:
        pairs = every.numpy()
        if len(pairs) == 1:
            return every[0]
        scores, ids = pairs[..., 0], pairs[..., 1]
        out = np.empty(pairs.shape[1:], np.float64)
        np.max(scores, axis=0, out=out[:, 0])
        np.min(np.where(scores == out[:, 0], ids, np.inf), axis=0, out=out[:, 1])
        return torch.from_numpy(out)

    def candidates(self, logits: torch.Tensor, which: Int64, count: int) -> torch.Tensor:
        values = _view(logits)
        out = np.full((len(which), count), PAD, np.int64)
        if values.shape[1] and count:
            for i, row in enumerate(which):
                self._select(values[row], out[i])
        return torch.from_numpy(out)

    def _select(self, row: Float32, out: Int64) -> None:
        if math.isnan(row.max()):
            out[0] = NAN_KEY
            return
        count, size = len(out), len(row)
        places = np.flatnonzero(row >= _lower_bound(row, count)) if count < size else np.arange(size)
        found = _encode(row[places], self._ids[places])
        if len(found) > count:
            found = np.partition(found, len(found) - count)[-count:]
        out[: len(found)] = found

    def units(
        self, logits: torch.Tensor, which: Int64, peak: torch.Tensor, temperature: Float64, least: Float64
    ) -> torch.Tensor:
        values, peaks = _view(logits), peak.numpy().astype(np.float32)
        out = np.empty(len(which), np.float64)
        scratch = self._floats
        with np.errstate(over="ignore", invalid="ignore"):
            for i, row in enumerate(which):
                np.subtract(values[row], peaks[i], out=scratch)
                if temperature[i] != 1.0:
                    np.multiply(scratch, np.float32(1.0 / temperature[i]), out=scratch)
                np.exp(scratch, out=scratch)
                np.multiply(scratch, np.float32(UNITS), out=scratch)
                np.rint(scratch, out=scratch)
                if least[i] > 0:
                    np.multiply(scratch, scratch >= np.float32(least[i]), out=scratch)
                out[i] = scratch.sum(dtype=np.float64)
        return torch.from_numpy(out)

    def at_least(self, logits: torch.Tensor, which: Int64, values: torch.Tensor) -> torch.Tensor:
        rows, least = _view(logits), values.numpy()
        return torch.tensor([np.count_nonzero(rows[row] >= least[i]) for i, row in enumerate(which)], dtype=torch.int64)

    def best_first(self, candidates: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(candidates.numpy(), axis=-1)[:, ::-1].copy())


def _view(logits: torch.Tensor) -> Float32:
    values: Float32 = logits.detach().numpy()
    return values


def _encode(logits: Float32, ids: Int64) -> Int64:
    """`filters.encode` in numpy."""
    bits = (logits + np.float32(0.0)).view(np.int32)
    ordered = (bits ^ ((bits >> 31) & np.int32(ID_TOP))).astype(np.int64)
    keys: Int64 = (ordered << 32) | (ID_TOP - ids)
    return keys


def _lower_bound(row: Float32, count: int) -> np.float32:
    """At most the count-th largest: the count-th largest of the maxima of disjoint columns."""
    width = 1024
    while width < 4 * count:
        width *= 2
    depth = len(row) // width
    if depth < 2:
        return np.float32(np.partition(row, len(row) - count)[-count])
    maxima = row[: depth * width].reshape(depth, width).max(axis=0)
    return np.float32(np.partition(maxima, width - count)[-count])
