"""The small operations on rows that live on the device: the interface, and a reference in torch for CPUs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RowOps(Protocol):
    """history, table: int32 [rows, width], the tokens and the blocks of each row. None of these waits for the device.

    Addresses count int32 elements.
    """

    def write_spans(self, arena: Tensor, spans: Tensor, data: Tensor, longest: int) -> None:
        """Copies spans of data, int32 [D], into arena, int32 [A].

        spans: int64 [3, n], where to, where from, and how many; `longest` is their maximum. Spans do not overlap.
        """
        ...

    def prepare(
        self,
        history: Tensor,
        table: Tensor,
        rows: Tensor,
        positions: Tensor,
        grow_address: Tensor,
        grow_value: Tensor,
        token_ids: Tensor,
    ) -> None:
        """Reads the token of each row at its position and enters new blocks into the table.

        rows: int32 [R]. positions: int64 [R]. grow_address, grow_value: int32 [R], into the flat table. token_ids:
        int64 [R], written.
        """
        ...

    def expand(
        self,
        history: Tensor,
        table: Tensor,
        rows: Tensor,
        starts: Tensor,
        query_starts: Tensor,
        block_size: int,
        num_tokens: int,
        longest: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, positions and K/V slots, int64 [num_tokens], of rows that compute several tokens.

        rows, starts: int32 [R], starts being first positions. query_starts: int32 [R + 1]. longest: the most tokens of
        any row.
        """
        ...

    def finish(self, history: Tensor, targets: Tensor, tokens: Tensor, peaks: Tensor, out: Tensor) -> None:
        """Enters sampled tokens into the flat history at targets, int64 [S], and both into out, float64 [2 * S].

        tokens: int64 [S]. peaks: float [S]. Token ids are exact as float64.
        """
        ...


class TorchRowOps:
    """Looks at what it is given, which only on a CPU costs nothing."""

    def write_spans(self, arena: Tensor, spans: Tensor, data: Tensor, longest: int) -> None:
        for to, start, count in spans.T.tolist():
            arena[to : to + count] = data[start : start + count]

    def prepare(
        self,
        history: Tensor,
        table: Tensor,
        rows: Tensor,
        positions: Tensor,
        grow_address: Tensor,
        grow_value: Tensor,
        token_ids: Tensor,
    ) -> None:
        table.view(-1)[grow_address.long()] = grow_value
        token_ids.copy_(history[rows.long(), positions])

    def expand(
        self,
        history: Tensor,
        table: Tensor,
        rows: Tensor,
        starts: Tensor,
        query_starts: Tensor,
        block_size: int,
        num_tokens: int,
        longest: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        counts = query_starts.diff().long()
        row = rows.long().repeat_interleave(counts)
        positions = torch.arange(num_tokens, device=starts.device) + (
            starts - query_starts[:-1]
        ).long().repeat_interleave(counts)
        slots = table[row, positions // block_size].long() * block_size + positions % block_size
        return history[row, positions].long(), positions, slots

    def finish(self, history: Tensor, targets: Tensor, tokens: Tensor, peaks: Tensor, out: Tensor) -> None:
        count = len(targets)
        history.view(-1)[targets] = tokens.int()
        out[:count] = tokens
        out[count:] = peaks
