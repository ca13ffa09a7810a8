"""A step in two halves: what they are, and that they compute what the whole step does."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.enginekit import make_rig, tokens_of
from tests.modelkit import make_checkpoint
from tests.symmkit import World
from treadle.engine.batch import ForwardBatch
from treadle.engine.comm import SingleComm
from treadle.engine.comm_symm import SymmetricComm
from treadle.engine.halves import split, split_point
from treadle.engine.rows import RowMirror, Work
from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, SamplingParams, StepPlan

SIDE = 1 << 16


def batch_of(decode: int, counts: list[int], contexts: list[int], on_device: bool) -> ForwardBatch:
    """Rows with tables, the first `decode` with one token. contexts: tokens before this step's."""
    starts = [0, *accumulate(counts)]
    tokens, rows = starts[-1], len(counts)
    lengths = [context + count for context, count in zip(contexts, counts, strict=True)]
    tables = torch.arange(rows * 4, dtype=torch.int32).view(rows, 4)
    return ForwardBatch(
        token_ids=torch.arange(tokens),
        positions=torch.arange(tokens) + 1000,
        slots=torch.arange(tokens) + 2000,
        query_starts=starts,
        context_lens=torch.tensor(lengths, dtype=torch.int32),
        max_context=max(lengths),
        block_tables=None if on_device else tables,
        num_decode=decode,
        sample_index=torch.tensor([tokens - 1]),
        rows=torch.arange(rows, dtype=torch.int32) if on_device else None,
        table=tables if on_device else None,
        query_starts_device=torch.tensor(starts, dtype=torch.int32) if on_device else None,
        max_query_len=max(counts),
        context_lens_host=lengths if on_device else None,
    )


def seen(batch: ForwardBatch) -> list[tuple[int, int, int, int, int]]:
    """Of every token: its id, position, slot, the length that it sees, and its row's first block."""
    tables, found = batch.tables(1).tolist(), []
    for row, length in enumerate(batch.context_lens.tolist()):
        start, stop = batch.query_starts[row], batch.query_starts[row + 1]
        assert stop > start and stop - start <= batch.max_query_len and length <= batch.max_context
        for token in range(start, stop):
            ids = (int(batch.token_ids[token]), int(batch.positions[token]), int(batch.slots[token]))
            found.append((*ids, length - (stop - 1 - token), tables[row][0]))
    return found


@given(
    decode=st.integers(0, 3),
    prefill=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    prefix=st.integers(0, 5),
    on_device=st.booleans(),
    data=st.data(),
)
def test_halves_are_two_chunks_of_the_same_rows(
    decode: int, prefill: list[int], prefix: int, on_device: bool, data: st.DataObject
) -> None:
    counts = [1] * decode + prefill
    if sum(counts) - decode < 2:
        return
    whole = batch_of(decode, counts, [prefix + row for row in range(len(counts))], on_device)
    at = data.draw(st.integers(decode + 1, whole.num_tokens - 1))
    head, tail = split(whole, at)
    assert seen(head) + seen(tail) == seen(whole)
    assert head.num_tokens == at and head.num_decode == decode and tail.num_decode == 0
    assert head.sample_index is None and tail.sample_index is None
    assert whole.context_lens.tolist() == [prefix + row + count for row, count in enumerate(counts)]
    if on_device:
        for half in (head, tail):
            assert half.query_starts_device is not None and half.query_starts_device.tolist() == half.query_starts
            assert half.context_lens_host == half.context_lens.tolist()
            assert half.max_context == max(half.context_lens_host)


@pytest.mark.parametrize(
    ("decode", "prefill", "point"),
    [(0, 16384, 8192), (5, 8192, 4224), (0, 8191, None), (8192, 1, None), (5300, 5000, None), (0, 8300, 4224)],
)
def test_where_a_step_is_split(decode: int, prefill: int, point: int | None) -> None:
    counts = [1] * decode + [prefill]
    assert split_point(batch_of(decode, counts, [0] * len(counts), False)) == point


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Nine blocks of 32 for two ranks, and a last layer behind others.
    return make_checkpoint(tmp_path_factory.mktemp("halves"), "qwen3", num_hidden_layers=3)


# Rows, as (row, position of the first token, tokens), of two steps, both cut in the middle of a row's tokens.
STEPS = (
    [(0, 0, tokens_of(0, 40)), (1, 0, tokens_of(1, 21))],
    [(1, 21, [7]), (0, 40, tokens_of(2, 37)), (2, 0, tokens_of(3, 5))],
)


def test_a_model_in_halves_computes_what_it_does_whole(checkpoint: Path) -> None:
    rig = make_rig(checkpoint, SingleComm(), native=False, pack=False)
    expected = torch.cat([rig.step(list(rows)) for rows in STEPS])
    world = World(2, SIDE, SIDE)
    halves = world.run(lambda comm: _logits(checkpoint, comm, split_from=32))
    whole = World(2, SIDE, SIDE).run(lambda comm: _logits(checkpoint, comm, split_from=1 << 20))
    # Four sums of each of two layers, for each rank and step; those of the last layer, of few rows, are small.
    assert len(world.shots) >= 2 * 2 * 2 * 4
    torch.testing.assert_close(torch.cat(halves, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(halves, 1), torch.cat(whole, 1), rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat(halves, 1).argmax(-1), expected.argmax(-1))


def test_what_does_not_fit_stays_whole(checkpoint: Path) -> None:
    world = World(2, 256, SIDE)
    found = world.run(lambda comm: _logits(checkpoint, comm, split_from=32))
    rig = make_rig(checkpoint, SingleComm(), native=False, pack=False)
    expected = torch.cat([rig.step(list(rows)) for rows in STEPS])
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


def _logits(checkpoint: Path, comm: SymmetricComm, split_from: int) -> torch.Tensor:
    torch.set_num_threads(1)
    rig = make_rig(checkpoint, comm, native=False, pack=False, split_from=split_from)
    with torch.inference_mode():
        return torch.cat([rig.step(list(rows)) for rows in STEPS])


def test_who_finds_what_the_same_step_writes_is_not_cut_off_from_it() -> None:
    """Two equal prompts in one step: of the second only the last token is left, so it stands before the first."""
    mirror = RowMirror(4, 128, block_size=16, num_blocks=32)
    tokens, blocks = pack([7] * 33), pack([1, 2, 3])
    writer = RowStart(0, 33, 0, tokens, blocks, SamplingParams(), 0, b"")

    def work(computed: int, count: int) -> Work:
        mirror.forget()
        finder = RowStart(1, 33, computed, tokens, pack([1, 2, 4]), SamplingParams(), 0, b"")
        counts = pack([33, count])
        return mirror.apply(StepPlan(0, b"", [writer, finder], b"", b"", pack([0, 1]), counts))

    found = work(32, 1)
    assert found.rows.tolist() == [1, 0] and found.num_decode == 1 and found.whole
    assert not work(16, 17).whole, "a chunk stands behind its writer"
    batch = batch_of(1, [1, 33], [32, 0], False)
    assert split_point(batch, 16) is not None
    assert split_point(replace(batch, whole=True), 16) is None
