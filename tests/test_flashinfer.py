"""The glue to FlashInfer, with its kernel's contract written out in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.engine.attention import TorchAttention
from treadle.engine.batch import ForwardBatch
from treadle.engine.flashinfer import FlashInferAttention, flashinfer_serves
from treadle.engine.flashinfer.backend import FlashInferPlan, Heads, flashinfer_attention
from treadle.engine.flashinfer.modules import VARIABLE, module_name, prebuilt
from treadle.errors import ConfigError

HEADS = Heads(q_heads=4, kv_heads=2, head_dim=8)
BLOCK = 4
SCALE = HEADS.head_dim**-0.5


class Buffers:
    taken = 0

    def device_memory(self) -> Tensor:
        return torch.empty(1)

    def take(self) -> Tensor:
        self.taken += 1
        return torch.empty(1)

    def copied(self) -> None:
        self.taken -= 1


class PretendedModule:
    """FA3's paged prefill: work is what `plan` was told on the host; the run sees only that and the table's pages."""

    def plan(self, *arguments: Tensor | int | bool) -> Sequence[int]:
        assert len(arguments) == 16
        starts, pages, lengths = arguments[3:6]
        assert isinstance(starts, Tensor) and isinstance(pages, Tensor) and isinstance(lengths, Tensor)
        assert starts.dtype is pages.dtype is lengths.dtype is torch.int32
        assert arguments[6:16] == (int(starts[-1]), len(lengths), 4, 2, BLOCK, False, 8, 8, True, -1)
        return [len(lengths), *starts.tolist(), *pages.tolist(), *lengths.tolist()]

    def paged_run(self, *arguments: object) -> None:
        assert len(arguments) == 24
        (work, q, k, v), table, out = arguments[2:6], arguments[8], arguments[10]
        assert isinstance(work, list) and isinstance(table, Tensor) and isinstance(out, Tensor)
        assert isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)
        assert arguments[12:15] == (1, 1, -1) and arguments[21] == SCALE
        rows, rest = work[0], work[1:]
        starts, pages, lengths = rest[: rows + 1], rest[rows + 1 : 2 * rows + 2], rest[2 * rows + 2 :]
        assert table.is_contiguous() and out.shape == q.shape
        for row in range(rows):
            count, length = starts[row + 1] - starts[row], lengths[row]
            used = table.flatten()[pages[row] : pages[row] + -(-length // BLOCK)].long()
            keys, values = (cache[used].transpose(0, 1).flatten(1, 2)[:, :length].double() for cache in (k, v))
            hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
            for head in range(HEADS.q_heads):
                mine = q[starts[row] : starts[row + 1], head].double()
                scores = (mine @ keys[head // 2].T * SCALE).masked_fill(hidden, -math.inf)
                out[starts[row] : starts[row + 1], head] = (scores.softmax(-1) @ values[head // 2]).to(out.dtype)


def make(counts: list[int], prefixes: list[int], decode: int, on_device: bool) -> ForwardBatch:
    """Rows with random pages; `on_device`: told as rows of a table, else as tables."""
    generator = torch.Generator().manual_seed(len(counts))
    contexts = [prefix + count for prefix, count in zip(prefixes, counts, strict=True)]
    longest, total = max(contexts), sum(counts)
    table = (torch.randperm(15 * 8, generator=generator)[: 15 * 8] + 1).view(15, 8).int()
    rows = torch.randperm(15, generator=generator)[: len(counts)].int()
    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    return ForwardBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.zeros(total, dtype=torch.int64),
        slots=torch.zeros(total, dtype=torch.int64),
        query_starts=starts,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        max_context=longest,
        block_tables=None if on_device else table[rows.long()],
        num_decode=decode,
        sample_index=None,
        rows=rows if on_device else None,
        table=table if on_device else None,
        query_starts_device=torch.tensor(starts, dtype=torch.int32),
        max_query_len=max(counts),
    )


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize(
    ("counts", "prefixes", "decode"),
    [([5], [0], 0), ([7, 2, 12], [0, 9, 3], 0), ([1, 1, 6, 3], [4, 17, 0, 8], 2)],
    ids=["one prompt", "prefixes", "with decode rows"],
)
def test_it_finds_what_the_reference_finds(
    counts: list[int], prefixes: list[int], decode: int, on_device: bool
) -> None:
    batch = make(counts, prefixes, decode, on_device)
    generator = torch.Generator().manual_seed(7)
    k, v = (torch.randn(121, 2, BLOCK, 8, generator=generator) for _ in range(2))
    q = torch.randn(sum(counts), 4, 8, generator=generator)
    reference = TorchAttention(SCALE, None)
    buffers = Buffers()
    backend = FlashInferAttention(TorchAttention(SCALE, None), PretendedModule(), buffers, HEADS, SCALE)
    plan = backend.plan(batch, BLOCK, q.dtype)
    assert isinstance(plan, FlashInferPlan) and buffers.taken == 0
    found = backend.attend(q, k, v, plan)
    torch.testing.assert_close(found, reference.attend(q, k, v, reference.plan(batch, BLOCK, q.dtype)))


def test_decoding_alone_is_left_to_the_other_backend() -> None:
    batch = make([1, 1], [3, 9], 2, True)
    backend = FlashInferAttention(TorchAttention(SCALE, None), PretendedModule(), Buffers(), HEADS, SCALE)
    plan = backend.plan(batch, BLOCK, torch.float32)
    assert not isinstance(plan, FlashInferPlan)
    out = backend.attend(torch.zeros(2, 4, 8), torch.zeros(121, 2, BLOCK, 8), torch.zeros(121, 2, BLOCK, 8), plan)
    assert out.shape == (2, 32)


def test_the_directory_is_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert prebuilt("fa3", 128) is None
    name = module_name("fa3", 128)
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.so").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert prebuilt("fa3", 128) == tmp_path / name / f"{name}.so"
    assert prebuilt("fa2", 128) is None
    with pytest.raises(ValueError, match="fa4"):
        module_name("fa4", 128)


def test_where_it_cannot_serve_it_says_what_it_needs() -> None:
    cpu = torch.device("cpu")
    assert not flashinfer_serves(cpu, torch.bfloat16, torch.bfloat16, 128, None)
    with pytest.raises(ConfigError, match="Hopper"):
        flashinfer_attention(
            TorchAttention(SCALE, None), HEADS, cpu, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, scale=1, window=None
        )
