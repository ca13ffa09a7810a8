"""Token masks: on the wire and back, and on a rank's slice of the logits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.engine.sampling.masks import LocalMasks, _mask_on_device, guided_places, mask_logits
from treadle.errors import ProtocolError
from treadle.scheduler.options import ServiceOptions
from treadle.scheduler.setup import configure_message
from treadle.transport.codec import pack, rank_codec
from treadle.transport.mask_pages import MaskPages, make_pages
from treadle.transport.masks import (
    BITS,
    EXCEPT,
    ONLY,
    Words,
    decode_masks,
    encode_masks,
    read_masks,
    shared_masks,
    words_for,
)
from treadle.transport.messages import Masks, SamplingParams, StepPlan

from .faultkit import FACTS
from .guidekit import words_of
from .samplingkit import Batch, cuts_of


def packed(allowed: np.ndarray) -> Words:
    """bool [rows, vocab] to uint32 [rows, words]."""
    return np.stack([words_of(frozenset(np.flatnonzero(row).tolist()), allowed.shape[1]) for row in allowed])


def unpacked(words: Words, vocab: int) -> np.ndarray:
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[..., :vocab].astype(bool)


@settings(deadline=None, max_examples=200)
@given(
    vocab=st.sampled_from([1, 31, 32, 33, 70, 100, 1000]),
    shares=st.lists(st.sampled_from([0.0, 0.002, 0.5, 0.998, 1.0]), min_size=1, max_size=9),
    same=st.booleans(),
    free=st.integers(0, 511),
    seed=st.integers(0, 99),
)
def test_masks_travel(vocab: int, shares: list[float], same: bool, free: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    allowed = random.random((len(shares), vocab)) < np.array(shares)[:, None]
    if same:
        allowed[-1] = allowed[0]
    unbound = np.array([bool(free >> row & 1) for row in range(len(shares))])
    codec = rank_codec()
    masks = codec.decode(codec.encode(encode_masks(3, packed(allowed), unbound)))
    assert isinstance(masks, Masks)
    found = decode_masks(masks, len(shares), vocab)
    assert ((found.rows == -1) == unbound).all()
    for row in np.flatnonzero(~unbound):
        assert (unpacked(found.words[found.rows[row]], vocab) == allowed[row]).all()
    assert len(found.words) == len(np.unique(allowed[~unbound], axis=0)), "each distinct mask once"


def test_the_shortest_form_is_taken() -> None:
    vocab = 1000
    few, most, half = np.zeros(vocab, bool), np.ones(vocab, bool), np.arange(vocab) % 2 == 0
    few[[3, 999]] = True
    most[[0, 31, 32]] = False
    masks = encode_masks(0, packed(np.stack([few, most, half, few])), np.zeros(4, bool))
    kinds = np.frombuffer(masks.kinds, np.int32).tolist()
    assert sorted(kinds) == [ONLY, EXCEPT, BITS]
    assert sorted(np.frombuffer(masks.places, np.int32).tolist()) == sorted(
        [0, 31, 0, 1, 31]
    )  # the last word is never full
    assert len(masks.words) == 4 * 5 and len(masks.bits) == 4 * words_for(vocab)


@pytest.mark.parametrize("bit", [0, 1, 30, 31])
def test_masks_that_differ_by_a_token_are_told_apart(bit: int) -> None:
    """And each travels once: the sums by which rows are found that have one mask must not collide."""
    words = np.full((600, 500), 0xFFFFFFFF, np.uint32)
    words[np.arange(500), np.arange(500)] ^= np.uint32(1 << bit)
    masks = encode_masks(0, words, np.zeros(600, bool))
    assert len(masks.kinds) == 4 * 501
    assert np.frombuffer(masks.counts, np.int32).tolist().count(1) == 500


def test_masks_whose_sums_are_alike_are_told_apart() -> None:
    """The sum is of pairs of words, and of the highest bit of a pair it tells only whether it changed an odd number of
    times."""
    words = np.full((64, 32), 0xFFFFFFFF, np.uint32)
    for row in range(1, 16):
        words[row, [1, 2 * row + 1]] ^= np.uint32(1 << 31)
    words[32:] = words[:32]
    masks = decode_masks(encode_masks(0, words, np.zeros(64, bool)), 64, 1024)
    assert len(masks.words) == 16
    assert (masks.words[masks.rows] == words).all()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": pack([0])},
        {"rows": pack([0, 2])},
        {"rows": pack([0, -2])},
        {"kinds": pack([ONLY])},
        {"kinds": pack([3, 3])},
        {"kinds": pack([-1, -1])},
        {"counts": pack([-1, 0])},
        {"counts": pack([2, 0])},
        {"places": pack([4])},
        {"places": pack([-1])},
        {"places": pack([0, 1])},
        {"words": b""},
        {"words": b"\0\0\0"},
        {"bits": b"\0\0\0"},
        {"bits": b"\0\0\0\0"},
        {"rows": b"\0"},
        {"kinds": pack([ONLY] * 3), "counts": pack([0] * 3), "places": b"", "words": b""},
    ],
)
def test_masks_that_do_not_fit_are_refused(change: dict[str, bytes]) -> None:
    allowed = np.zeros((2, 100), bool)
    allowed[0, [3, 9]] = True
    allowed[1] = np.arange(100) % 2
    masks = encode_masks(0, packed(allowed), np.zeros(2, bool))
    decode_masks(masks, 2, 100)
    with pytest.raises(ProtocolError):
        decode_masks(msgspec.structs.replace(masks, **change), 2, 100)


@pytest.mark.parametrize("places", [[5, 2], [2, 2]])
def test_words_of_a_mask_ascend(places: list[int]) -> None:
    allowed = np.zeros((1, 1000), bool)
    allowed[0, [64, 160]] = True
    masks = encode_masks(0, packed(allowed), np.zeros(1, bool))
    assert masks.places == pack([2, 5])
    with pytest.raises(ProtocolError):
        decode_masks(msgspec.structs.replace(masks, places=pack(places)), 1, 1000)


@pytest.fixture
def shared() -> Iterator[tuple[MaskPages, MaskPages]]:
    """As two processes have the same memory."""
    descriptor, writer = make_pages(2, 3, words_for(320))
    reader = MaskPages(descriptor, 2, 3, words_for(320))
    os.close(descriptor)  # as a group's end does, while masks may still be made for it
    yield writer, reader


def test_masks_in_shared_memory_are_those_of_their_step(shared: tuple[MaskPages, MaskPages]) -> None:
    """Each of two steps in flight has a place of its own; a rank applies its slice of what it finds there."""
    writer, reader = shared
    random, codec = np.random.default_rng(2), rank_codec()
    steps = {step: random.random((3, 320)) < 0.5 for step in (6, 7)}
    for step, allowed in steps.items():
        writer.words(step, 3)[:] = packed(allowed)
    for step, allowed in steps.items():
        masks = codec.decode(codec.encode(shared_masks(step, np.array([False, True, False]))))
        assert isinstance(masks, Masks)
        local = LocalMasks.of(masks, np.array([2, 0, 1]), 100, 97, 320, reader)
        logits = torch.zeros(3, 97)
        mask_logits(logits, local)
        assert (logits[0] == 0).all() and local.places.tolist() == [2, 1]
        assert ((logits[[2, 1]] == 0).numpy() == allowed[[0, 2], 100:197]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": pack([0, 1])},
        {"rows": pack([0, 1, 3])},
        {"rows": pack([0, 1, -2])},
        {"kinds": pack([ONLY])},
        {"words": b"\0\0\0\0"},
    ],
)
def test_shared_masks_that_do_not_fit_are_refused(
    shared: tuple[MaskPages, MaskPages], change: dict[str, bytes]
) -> None:
    masks, pages = shared_masks(0, np.zeros(3, bool)), shared[1]
    read_masks(masks, 3, 320, pages)
    with pytest.raises(ProtocolError):
        read_masks(msgspec.structs.replace(masks, **change), 3, 320, pages)


def test_memory_without_a_descriptor_is_refused() -> None:
    """The system would give some that nobody shares."""
    with pytest.raises(ValueError, match="no descriptor"):
        MaskPages(-1, 2, 3, 10)


def test_masks_in_memory_that_is_not_shared_are_refused(shared: tuple[MaskPages, MaskPages]) -> None:
    for rows, vocab, pages in ((3, 320, None), (3, 400, shared[1]), (4, 320, shared[1])):
        with pytest.raises(ProtocolError, match="not shared"):
            read_masks(shared_masks(0, np.zeros(rows, bool)), rows, vocab, pages)


@pytest.mark.parametrize(("device", "there", "slots"), [("cuda", True, 2), ("cuda", False, 0), ("cpu", True, 0)])
def test_memory_is_shared_with_gpus_where_there_is_some(
    monkeypatch: pytest.MonkeyPatch, device: str, there: bool, slots: int
) -> None:
    """A sandbox may refuse it: then masks are sent."""

    def refuse(name: str, flags: int = 0) -> int:
        raise PermissionError(1, "Operation not permitted")

    if not there:
        monkeypatch.setattr(os, "memfd_create", refuse)
    configure = configure_message(FACTS, ServiceOptions(device=device, pipeline_depth=2), Path("/nowhere"))
    assert configure.mask_slots == slots and configure.mask_words == words_for(FACTS.vocab_size)


@pytest.mark.parametrize(("start", "columns"), [(0, 320), (0, 100), (100, 97), (33, 1), (64, 0), (300, 20)])
def test_a_rank_applies_its_slice(start: int, columns: int) -> None:
    vocab, random = 320, np.random.default_rng(1)
    allowed = random.random((4, vocab)) < np.array([0.01, 0.5, 0.99, 0.5])[:, None]
    allowed[3] = allowed[1]
    free = np.array([False, False, True, False])
    masks = encode_masks(0, packed(allowed), free)
    places = np.array([4, 0, 3, 1])
    local = LocalMasks.of(masks, places, start, columns, vocab)
    logits = torch.from_numpy(random.standard_normal((6, columns)).astype(np.float32))
    expected = logits.clone()
    for place, row, unbound in zip(places, allowed, free, strict=True):
        if not unbound:
            expected[place, torch.from_numpy(~row[start : start + columns])] = float("-inf")
    on_host, on_device, half = logits.clone(), logits.clone(), logits.bfloat16()
    mask_logits(on_host, local)
    _mask_on_device(on_device, local)
    mask_logits(half, local)
    assert torch.equal(on_host, expected) and torch.equal(on_device, expected)
    assert torch.equal(half, expected.bfloat16())


def test_guided_rows_are_found_among_those_that_sample() -> None:
    plan = StepPlan(0, b"", [], b"", b"", b"", b"", pack([7, 2, 9]))
    assert guided_places(plan, np.array([2, 5, 9, 7])).tolist() == [3, 0, 2]
    for sampled in ([2, 5, 9], []):
        with pytest.raises(ProtocolError, match="do not sample"):
            guided_places(plan, np.array(sampled, np.int64))


def test_the_sampler_chooses_what_is_left_on_every_cut() -> None:
    """As if the forbidden had been banned one by one; log-probabilities stay those of the model."""
    vocab, random = 130, np.random.default_rng(2)
    kinds = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1),
        SamplingParams(temperature=1, top_k=5, top_p=0.9),
        SamplingParams(temperature=1, logprobs=2),
        SamplingParams(temperature=1, logit_bias={3: 90.0}, repetition_penalty=1.5),
        SamplingParams(temperature=1),
    ]
    allowed = random.random((len(kinds), vocab)) < 0.1
    allowed[:, 3] = False
    logits = torch.from_numpy(random.standard_normal((len(kinds), vocab)).astype(np.float32) * 3)
    free = np.array([False] * 5 + [True])
    masks = encode_masks(0, packed(allowed), free)
    banned = [np.flatnonzero(~row).tolist() for row in allowed[:5]]
    slow = [msgspec.structs.replace(one, banned_token_ids=ids) for one, ids in zip(kinds, banned, strict=False)]
    expected = Batch(vocab, [*slow, kinds[5]]).sample(logits)
    for cuts in cuts_of(vocab):
        batch = Batch(vocab, kinds)
        got = batch.sample(logits, cuts, masks=masks)
        assert got.tokens.tolist() == expected.tokens.tolist()
        assert got.logprobs == expected.logprobs and not got.faults


def test_a_row_for_which_nothing_is_left_is_at_fault_alone() -> None:
    masks = encode_masks(0, packed(np.zeros((1, 50), bool)), np.zeros(1, bool))
    batch = Batch(50, [SamplingParams(temperature=0)] * 2)
    got = batch.sample(torch.zeros((2, 50)), masks=masks)
    assert [fault.row for fault in got.faults] == [0] and "no token is allowed" in got.faults[0].message
