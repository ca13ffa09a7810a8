"""FlashInfer's prefill kernel on a Hopper GPU against attention by its definition, in pages poisoned with NaN."""

from __future__ import annotations

import pytest
import torch

from treadle.engine.batch import ForwardBatch
from treadle.engine.flashinfer import flashinfer_attention, flashinfer_serves
from treadle.engine.flashinfer.backend import FlashInferAttention, Heads

from .attentionkit import PagedRows

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16
LENGTHS = {
    "one prompt": [(700, 700)],
    "ragged, with prefixes": [(1, 1), (129, 129), (515, 3), (2049, 96), (4100, 1024), (300, 300)],
    "decode rows first": [(77, 1), (1030, 1), (5, 1), (640, 640), (999, 130)],
    "many small": [(8 + i, 2 + i % 7) for i in range(200)],
}


def backend(heads: Heads, scale: float) -> FlashInferAttention:
    from treadle.engine.kernels.paged_attention import TritonAttention

    device = torch.device("cuda")
    if not flashinfer_serves(device, DTYPE, DTYPE, heads.head_dim, None):
        pytest.skip("no FlashInfer module for this GPU and head size")
    decode = TritonAttention(scale, None)
    return flashinfer_attention(decode, heads, device, dtype=DTYPE, kv_dtype=DTYPE, scale=scale, window=None)


def batch_of(case: PagedRows) -> ForwardBatch:
    tokens = case.starts[-1]
    nothing = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    decode = next((i for i, (_, queries) in enumerate(case.lengths) if queries > 1), len(case.lengths))
    return ForwardBatch(
        token_ids=nothing,
        positions=nothing,
        slots=nothing,
        query_starts=case.starts,
        context_lens=case.context_lens,
        max_context=case.max_context,
        block_tables=None,
        num_decode=decode,
        sample_index=None,
        rows=case.rows,
        table=case.table,
        query_starts_device=case.query_starts,
        max_query_len=case.max_query_len,
    )


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("heads", [(32, 8, 128), (16, 8, 128), (4, 4, 128), (9, 3, 64)])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_it_attends(lengths: list[tuple[int, int]], heads: tuple[int, int, int], block_size: int) -> None:
    scale = heads[2] ** -0.5
    case = PagedRows(lengths, heads, block_size, DTYPE, torch.device("cuda"), seed=len(lengths))
    attention = backend(Heads(*heads), scale)
    for _ in range(6):  # more often than there are buffers for plans
        plan = attention.plan(batch_of(case), block_size, DTYPE)
        found = attention.attend(case.queries, case.k_cache, case.v_cache, plan).cpu().double()
    expected = case.expected(scale, None).cpu()
    assert float((found - expected).norm() / expected.norm()) < 1e-2
