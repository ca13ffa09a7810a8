"""What one forward pass computes: tokens of several sequences, laid end to end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ForwardBatch:
    """T tokens of R rows, of which S get logits; tensors on the model's device, contiguous.

    The first `num_decode` rows have exactly one token each; the prefill rows follow.

    token_ids, positions: [T] int64. slots: [T] int64, block * block_size + offset, where the token's K and V go.
    query_starts: R + 1 offsets into T. context_lens: [R] int32, with this step's tokens. max_context: their maximum, or
    a bound on it. block_tables: [R, P] int32, P >= ceil(max_context / block_size); entries past a row's end are never
    read. sample_index: [S] int64 into T, None for every token.

    Where the rows live on the device, the tables do too, and block_tables is None: rows [R] int32 index table
    [max_rows, P] int32; query_starts_device [R + 1] int32 are the query_starts; max_query_len is the most tokens that
    any row has. context_lens_host: context_lens where the host knows them, for backends that plan there.

    whole: in each layer all rows write before any row reads (`Work.whole`).
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    query_starts: list[int]
    context_lens: Tensor
    max_context: int
    block_tables: Tensor | None
    num_decode: int
    sample_index: Tensor | None
    rows: Tensor | None = None
    table: Tensor | None = None
    query_starts_device: Tensor | None = None
    max_query_len: int = 1
    context_lens_host: list[int] | None = None
    whole: bool = False

    @property
    def num_rows(self) -> int:
        return len(self.query_starts) - 1

    @property
    def num_tokens(self) -> int:
        return self.query_starts[-1]

    def tables(self, block_size: int) -> Tensor:
        """The block tables of these rows, [R, P] int32, for a backend that does not index by row."""
        if self.block_tables is not None:
            return self.block_tables
        if self.rows is None or self.table is None:
            raise ValueError("a batch needs block_tables, or rows and table")
        pages = -(-self.max_context // block_size)
        return self.table[:, :pages].index_select(0, self.rows)
