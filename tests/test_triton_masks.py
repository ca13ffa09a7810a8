"""Masks on a GPU: the kernel, and the fused sampler on what it leaves."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from treadle.engine.sampling.masks import LocalMasks, _mask_on_device
from treadle.transport.mask_pages import make_pages
from treadle.transport.masks import encode_masks, shared_masks, words_for

from .samplingkit import Batch
from .test_masks import packed
from .test_triton_sampling import MIXED, check, fused, logits_of
from .tritonkit import DEVICE

from treadle.engine.cuda.masks import DeviceMasks  # isort: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("start", "columns"), [(0, 700), (350, 350), (33, 1)])
@pytest.mark.parametrize(
    "shares", [(0.01, 0.5, 0.99, 0.5, 0.7), (0.01, 0.02, 0.01, 0.99, 0.0), (0.5, 0.5, 0.5, 0.5, 0.4)]
)
def test_masks_are_spread_out_there_and_applied(
    shares: tuple[float, ...], start: int, columns: int, dtype: torch.dtype
) -> None:
    """As the words that are given, in one or several pieces, as whole masks, and as both; one row has none."""
    vocab, random = 700, np.random.default_rng(3)
    allowed = random.random((5, vocab)) < np.array(shares)[:, None]
    masks = encode_masks(0, packed(allowed), np.array([False, False, True, False, False]))
    local = LocalMasks.of(masks, np.array([4, 1, 0, 5, 2]), start, columns, vocab)
    logits = torch.randn((6, columns + 3), dtype=torch.float32).to(DEVICE, dtype)[:, :columns]
    expected = logits.clone()
    _mask_on_device(expected, local)
    DeviceMasks.of(local, DEVICE).apply(logits)
    assert torch.equal(logits, expected)
    assert (expected == float("-inf")).any()


def test_masks_in_shared_memory_are_applied() -> None:
    vocab, random = 700, np.random.default_rng(5)
    allowed = random.random((3, vocab)) < 0.5
    descriptor, pages = make_pages(2, 4, words_for(vocab))
    pages.words(9, 3)[:] = packed(allowed)
    masks = shared_masks(9, np.array([False, True, False]))
    local = LocalMasks.of(masks, np.array([4, 1, 0]), 350, 350, vocab, pages)
    logits = torch.randn((6, 350)).to(DEVICE)
    expected = logits.clone()
    _mask_on_device(expected, local)
    DeviceMasks.of(local, DEVICE).apply(logits)
    assert torch.equal(logits, expected) and (expected[[4, 0]] == float("-inf")).any(1).all()
    os.close(descriptor)


def test_the_words_of_many_masks() -> None:
    """More than one program of the kernel puts."""
    vocab, random = 3_000, np.random.default_rng(4)
    allowed = random.random((70, vocab)) < 0.006
    masks = encode_masks(0, packed(allowed), np.zeros(70, np.bool_))
    local = LocalMasks.of(masks, np.arange(70), 0, vocab, vocab)
    assert len(local.given.where) > 1024
    assert torch.equal(DeviceMasks.of(local, DEVICE).words.cpu(), torch.from_numpy(local.words()))


@pytest.mark.parametrize("left", [1, 60])
def test_the_fused_sampler_takes_what_is_left(left: int) -> None:
    """Whole tiles are minus infinity, which the filters of the fused sampler meet nowhere else."""
    vocab = 700
    batch, logits = Batch(vocab, MIXED), logits_of(len(MIXED), vocab)
    random = np.random.default_rng(left)
    for row in range(len(MIXED)):
        banned = np.ones(vocab, bool)
        banned[random.choice(vocab, left, replace=False)] = False
        logits[row, torch.from_numpy(banned)] = float("-inf")
    for cuts in ([0, vocab],) if left == 1 else ([0, 300, vocab],):
        tokens = check(batch, logits, cuts)
        assert logits[torch.arange(len(MIXED)), tokens].isfinite().all()


def test_nothing_left_is_a_fault_of_that_row() -> None:
    batch, logits = Batch(300, MIXED[:4]), logits_of(4, 300)
    logits[1:3] = float("-inf")
    tokens, peaks = fused(batch, logits)
    assert peaks.isfinite().tolist() == [True, False, False, True]
    assert tokens[1:3].tolist() == [0, 0]
