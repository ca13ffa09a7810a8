"""What the device does in a step: from a packet of numbers to logits, from logits to tokens.

`decode` and `sample` touch nothing but memory that stays where it is, launch the same work whenever they are called
with the same sizes, and wait for nothing, so they may be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from treadle.engine.batch import ForwardBatch
from treadle.engine.comm import Communicator
from treadle.engine.kv import KVCache
from treadle.engine.model import Decoder
from treadle.engine.sampling.masks import LocalMasks

from .device_rows import DeviceRows
from .staging import Field, Layout, Staging

# Plans in flight are eight at most.
TURNS = 12


class FusedSampler(Protocol):
    """Sampling without edits, on the device."""

    world_size: int

    def __call__(
        self, logits: Tensor, rows: Tensor, positions: Tensor, filtered: bool, comm: Communicator | None = None
    ) -> tuple[Tensor, Tensor]:
        """logits [S, vocab_local], rows int32 [S], positions int64 [S] to tokens int64 [S] and peaks [S].

        filtered: whether any of the rows may use top-k, top-p or min-p. comm: instead of its own.
        """
        ...

    def mask(self, logits: Tensor, masks: LocalMasks) -> None:
        """Makes minus infinity of what the masks forbid; before the call that samples, and outside of a graph."""
        ...


@cache
def sample_layout(size: int) -> Layout:
    """positions, targets: int64, where the token will be, as a position and as an address. rows: int32. All [size]."""
    return Layout([Field(size, True), Field(size, True), Field(size, False)])


@cache
def decode_layout(size: int) -> Layout:
    """positions, slots: int64. rows, context_lens, grow_address, grow_value: int32. All [size], behind the sampling."""
    return Layout([*(Field(size, True),) * 2, *(Field(size, False),) * 4], sample_layout(size).end)


def mixed_layout(size: int, rows: int, indices: int) -> Layout:
    """rows, starts, context_lens: int32 [rows]; query_starts: [rows + 1]; sample_index: int64 [indices]."""
    fields = [*(Field(rows, False),) * 3, Field(rows + 1, False), Field(indices, True)]
    return Layout(fields, sample_layout(size).end)


class StepProgram:
    """Owns the step's static memory. `kv` must be set before the first step.

    logits: [max_rows, vocab_local], of the model's dtype. out: float64 [2 * max_rows], a step's tokens, then peaks.
    """

    def __init__(
        self,
        model: Decoder,
        rows: DeviceRows,
        fused: FusedSampler | None,
        *,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        count = rows.max_rows
        self.model = model
        self.rows = rows
        self.fused = fused
        self.kv: KVCache | None = None
        self.logits = torch.zeros((count, model.vocab_local), dtype=dtype, device=device)
        self.out = torch.zeros(2 * count, dtype=torch.float64, device=device)
        words = decode_layout(count).end + mixed_layout(count, count, count + max_tokens).end
        self.staging = Staging(words, TURNS, device)
        self._token_ids = torch.zeros(count, dtype=torch.int64, device=device)
        self._each = torch.arange(count + 1, dtype=torch.int32, device=device)

    def decode(self, size: int, max_context: int) -> None:
        """The logits of `size` rows with one token each, which the packet describes."""
        rows = self.rows
        positions, slots, numbers, lengths, address, value = decode_layout(size).device(self.staging.device)
        token_ids = self._token_ids[:size]
        rows.ops.prepare(rows.history, rows.table, numbers, positions, address, value, token_ids)
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=list(range(size + 1)),
            context_lens=lengths,
            max_context=max_context,
            block_tables=None,
            num_decode=size,
            sample_index=None,
            rows=numbers,
            table=rows.table,
            query_starts_device=self._each[: size + 1],
        )
        self.model.logits_into(self.forward(batch), self.logits[:size])

    def mixed(
        self,
        layout: Layout,
        query_starts: list[int],
        context_lens: list[int],
        num_decode: int,
        max_query_len: int,
        whole: bool = False,
    ) -> Tensor:
        """The hidden states, at its sample_index, of the step that the packet describes. whole: see `ForwardBatch`."""
        rows = self.rows
        numbers, starts, lengths, starts_device, index = layout.device(self.staging.device)
        token_ids, positions, slots = rows.ops.expand(
            rows.history, rows.table, numbers, starts, starts_device, rows.block_size, query_starts[-1], max_query_len
        )
        batch = ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_starts=query_starts,
            context_lens=lengths,
            max_context=max(context_lens),
            block_tables=None,
            num_decode=num_decode,
            sample_index=index,
            rows=numbers,
            table=rows.table,
            query_starts_device=starts_device,
            max_query_len=max_query_len,
            context_lens_host=context_lens,
            whole=whole,
        )
        return self.forward(batch)

    def forward(self, batch: ForwardBatch) -> Tensor:
        if self.kv is None:
            raise ValueError("a step before there is a KV cache")
        return self.model.forward(batch, self.kv)

    def sample(self, size: int, filtered: bool) -> None:
        """Tokens for the first `size` logits, into `out` and into the rows' history."""
        if self.fused is None:
            raise ValueError("there is no fused sampler here")
        positions, targets, numbers = sample_layout(size).device(self.staging.device)
        tokens, peaks = self.fused(self.logits[:size], numbers, positions, filtered)
        self.finish(targets, tokens, peaks)

    def mask(self, masks: LocalMasks) -> None:
        """Applies masks to the logits that the next `sample` takes. Not for a graph."""
        if self.fused is None:
            raise ValueError("there is no fused sampler here")
        self.fused.mask(self.logits, masks)

    def finish(self, targets: Tensor, tokens: Tensor, peaks: Tensor) -> None:
        self.rows.ops.finish(self.rows.history, targets, tokens, peaks, self.out[: 2 * len(targets)])
