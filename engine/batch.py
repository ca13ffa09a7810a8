"""What one forward pass computes: tokens of several sequences, laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """T tokens of R rows, of which S get logits; tensors on the model's device, contiguous.

    The first `num_decode` rows have exactly one token each; the prefill rows follow.

    token_ids, positions: [T] int64. slots: [T] int64, block * block_size + offset, where the token's K and V go.
    query_starts: R + 1 offsets into T. context_lens: [R] int32, with this step's tokens. max_context: their maximum.
    block_tables: [R, P] int32, P >= ceil(max_context / block_size); entries past a row's end are never read.
    sample_index: [S] int64 into T.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: list[int]
    context_lens: Tensor
    max_context: int
    block_tables: Tensor
    num_decode: int
    sample_index: Tensor

    @property
    def num_rows(self) -> int:
        return len(self.query_starts) - 1

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]
