"""A step's tokens in two halves, one after the other, as if they had been planned as two chunks of prefill."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from torch import Tensor

from .batch import ForwardBatch

# Fewer tokens keep the links too short a time to be worth twice the launches.
LEAST_TOKENS = 8192
# Halves begin at whole tiles of a product.
_TILE = 128


def split_point(batch: ForwardBatch, least: int = LEAST_TOKENS) -> int | None:
    """The token at which the second half begins; None where the step stays whole."""
    tokens = batch.num_tokens
    if batch.whole or tokens < least:
        return None
    at = -(-tokens // (2 * _TILE)) * _TILE if tokens >= 2 * _TILE else tokens // 2
    return at if batch.num_decode < at < tokens else None


def split(batch: ForwardBatch, at: int) -> tuple[ForwardBatch, ForwardBatch]:
    """The tokens before `at` and those from there on; num_decode < at < num_tokens.

    A row may lie in both: its later part then sees the earlier one's keys as a context, so in every layer the first
    half is to write them before the second looks. Neither half has a `sample_index`.
    """
    starts = batch.query_starts
    rows = bisect_left(starts, at)  # begin before `at`
    later = starts[rows] - at  # tokens of the last of them that lie behind it
    first_later = rows - 1 if later else rows
    head_starts = [*starts[:rows], at]
    tail_starts = [max(start - at, 0) for start in starts[first_later:]]
    lengths = batch.context_lens[:rows].clone()
    lengths[-1:] -= later
    host = batch.context_lens_host
    head_host = None if host is None else [*host[: rows - 1], host[rows - 1] - later]
    tail_host = None if host is None else host[first_later:]
    device = batch.query_starts_device
    head = replace(
        batch,
        token_ids=batch.token_ids[:at],
        positions=batch.positions[:at],
        slots=batch.slots[:at],
        query_starts=head_starts,
        context_lens=lengths,
        max_context=batch.max_context if head_host is None else max(head_host),
        block_tables=_cut(batch.block_tables, 0, rows),
        sample_index=None,
        rows=_cut(batch.rows, 0, rows),
        query_starts_device=None if device is None else device[: rows + 1].clamp(max=at),
        max_query_len=_longest(head_starts),
        context_lens_host=head_host,
    )
    tail = replace(
        batch,
        token_ids=batch.token_ids[at:],
        positions=batch.positions[at:],
        slots=batch.slots[at:],
        query_starts=tail_starts,
        context_lens=batch.context_lens[first_later:],
        max_context=batch.max_context if tail_host is None else max(tail_host),
        block_tables=_cut(batch.block_tables, first_later, batch.num_rows),
        num_decode=0,
        sample_index=None,
        rows=_cut(batch.rows, first_later, batch.num_rows),
        query_starts_device=None if device is None else (device[first_later:] - at).clamp(min=0),
        max_query_len=_longest(tail_starts),
        context_lens_host=tail_host,
    )
    return head, tail


def _cut(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if tensor is None else tensor[start:stop]


def _longest(starts: Sequence[int]) -> int:
    return max(stop - start for start, stop in pairwise(starts))
