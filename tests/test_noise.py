"""The counter-based noise: its statistics, and that numpy and torch, whole and sliced, make the same of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.engine.sampling.local import TorchOps
from treadle.engine.sampling.local_cpu import CpuOps
from treadle.engine.sampling.noise import fold, gumbel, gumbel_np, hash_ids, noise_keys

VOCAB = 49152
KEYS = [[1293516399, 2802244911], [1634902187, 1678915623]]
WORDS = [[1266235307, 4195165299, 1170384358]]


def words(seeds: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    keys = noise_keys(seeds.astype(np.uint64), positions)
    return hash_ids(fold(ids.astype(np.int64)), keys[:, :1], keys[:, 1:])


def chi_square_z(counts: np.ndarray) -> float:
    """Standard normal for uniform counts, nearly."""
    expected = counts.sum() / counts.size
    value = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return float((value - freedom) / np.sqrt(2 * freedom))


AXES = {
    "ids": lambda n: (np.full(1, 7), np.full(1, 3), np.arange(n)),
    "seeds": lambda n: (np.arange(n), np.full(n, 3), np.full(1, 5)),
    "positions": lambda n: (np.full(n, 7), np.arange(n), np.full(1, 5)),
    "far seeds": lambda n: (np.arange(n) * (1 << 40), np.full(n, 3), np.full(1, 5)),
    "diagonal": lambda n: (np.arange(n), np.arange(n)[::-1].copy(), np.full(1, 5)),
}


@pytest.mark.parametrize("axis", AXES)
def test_uniform_along_every_axis(axis: str) -> None:
    h = words(*AXES[axis](1 << 17)).ravel()
    for shift in (0, 12, 24):  # low, middle and high bits
        counts = np.bincount((h >> shift) & 0xFF, minlength=256)
        assert abs(chi_square_z(counts)) < 5


@pytest.mark.parametrize("axis", AXES)
def test_neighbours_are_independent(axis: str) -> None:
    """Pairs of neighbours fill a 32 by 32 table evenly, and their noise does not correlate."""
    h = words(*AXES[axis](1 << 17)).ravel()
    for lag in (1, 2, 1024):
        pairs = (h[:-lag] >> 27) * 32 + (h[lag:] >> 27)
        assert abs(chi_square_z(np.bincount(pairs, minlength=1024)[:1024])) < 5
        g = gumbel_np(h)
        assert abs(np.corrcoef(g[:-lag], g[lag:])[0, 1]) * np.sqrt(len(h)) < 5


def test_streams_of_neighbouring_keys_do_not_correlate() -> None:
    """Whole vocabularies of noise, between neighbouring positions and seeds, at equal ids and at shifted ones."""
    positions = gumbel_np(words(np.full(64, 42), np.arange(64), np.arange(4096)))
    seeds = gumbel_np(words(np.arange(64), np.full(64, 9), np.arange(4096)))
    for block in (positions, seeds):
        matrix = np.corrcoef(block)[np.triu_indices(64, 1)] * np.sqrt(4096)
        assert np.abs(matrix).max() < 5.5 and abs(matrix.std() - 1) < 0.1
        shifted = np.corrcoef(block[:-1, :-1].ravel(), block[1:, 1:].ravel())[0, 1]
        assert abs(shifted) * np.sqrt(block.size) < 5


def test_avalanche() -> None:
    """Each bit of seed, position and id changes each bit of the hash half of the time."""
    count = 4000
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, 1 << 63, count)
    positions, ids = rng.integers(0, 1 << 17, count), rng.integers(0, 1 << 17, count)

    def one(s: np.ndarray, p: np.ndarray, i: np.ndarray) -> np.ndarray:
        keys = noise_keys(s.astype(np.uint64), p)
        return hash_ids(fold(i), keys[:, 0], keys[:, 1])

    base = one(seeds, positions, ids)
    flips = (
        [(1 << b, 0, 0) for b in range(63)] + [(0, 1 << b, 0) for b in range(17)] + [(0, 0, 1 << b) for b in range(17)]
    )
    for s, p, i in flips:
        changed = base ^ one(seeds ^ s, positions ^ p, ids ^ i)
        rates = ((changed[:, None] >> np.arange(32)) & 1).mean(0)
        assert np.abs(rates - 0.5).max() < 5.5 * 0.5 / np.sqrt(count)


def test_gumbel_moments_and_range() -> None:
    g = gumbel_np(words(np.full(8, 1), np.arange(8), np.arange(VOCAB)))
    n = g.size
    assert abs(g.mean() - np.euler_gamma) < 5 * np.sqrt(np.pi**2 / 6 / n)
    assert abs(g.var() - np.pi**2 / 6) < 0.02
    ends = gumbel_np(np.array([0, (1 << 32) - 1]))
    assert np.isfinite(ends).all() and 22 < ends[0] < 23 and -3.2 < ends[1] < -3


def test_no_two_tokens_share_their_noise() -> None:
    h = words(np.array([5]), np.array([5]), np.arange(VOCAB)).ravel()
    assert len(np.unique(h)) == VOCAB


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31 - 1), st.integers(0, 200), st.integers(1, 300))
def test_numpy_torch_and_slices_agree(seed: int, position: int, start: int, count: int) -> None:
    keys = noise_keys(np.array([seed], np.uint64), np.array([position]))
    ids = np.arange(start, start + count)
    h = hash_ids(fold(ids), keys[:, :1], keys[:, 1:])[0]
    assert ((h >= 0) & (h < 1 << 32)).all()
    key = torch.from_numpy(keys)
    assert np.array_equal(hash_ids(fold(torch.from_numpy(ids)), key[:, :1], key[:, 1:])[0].numpy(), h)
    assert np.array_equal(CpuOps(start, count)._hash(keys[0]), h.astype(np.uint32))
    assert np.allclose(gumbel(torch.from_numpy(h)).numpy(), gumbel_np(h), rtol=1e-14)


def test_known_values() -> None:
    """Pinned: a change of these numbers changes what every seed gives."""
    keys = noise_keys(np.array([0, 2**64 - 1], np.uint64), np.array([0, 17]))
    assert keys.tolist() == KEYS
    assert hash_ids(fold(np.array([0, 1, 49151])), keys[:1, :1], keys[:1, 1:]).tolist() == WORDS


@pytest.mark.parametrize("temperature", [1e-5, 0.01, 1.0, 50.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0, 1e4])
def test_bounded_search_finds_the_exact_winner(temperature: float, scale: float) -> None:
    """CPUs skip most logarithms; the winner must be that of computing all of them."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy((rng.standard_normal((16, 3000)) * scale).astype(np.float32))
    logits[3, ::2] = float("-inf")
    which, t = np.arange(16), np.full(16, temperature)
    keys = noise_keys(np.arange(16).astype(np.uint64), np.arange(16))
    fast = CpuOps(100, 3000).perturbed(logits, which, t, keys)
    slow = TorchOps(100, 3000, torch.device("cpu")).perturbed(logits, which, t, keys)
    assert torch.equal(fast[:, 1], slow[:, 1])
    torch.testing.assert_close(fast[:, 0], slow[:, 0], rtol=1e-13, atol=1e-13)
