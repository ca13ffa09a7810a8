"""The fused sampler on a GPU: tokens of the CPU at full size, its distribution, and inside a CUDA graph."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from treadle.engine.comm import SingleComm
from treadle.transport.messages import RowStart, SamplingParams

from .samplingkit import Batch

pytest.importorskip("triton")
from treadle.engine.sampling.fused import DeviceParams, FusedWorkspace, pack_params, sample_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=1),
    "top_k": SamplingParams(temperature=0.7, top_k=50),
    "top_p": SamplingParams(temperature=1.3, top_p=0.9),
    "min_p": SamplingParams(temperature=1, min_p=0.05),
    "all": SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.01),
    "flat": SamplingParams(temperature=30, top_p=0.9),
    "wide": SamplingParams(temperature=1, top_k=5000, top_p=0.99),
}


def logits_of(rows: int, vocab: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * scale


class Fused:
    """A batch on the device, with static tensors."""

    def __init__(self, batch: Batch) -> None:
        count = len(batch.params)
        self.params = DeviceParams.empty(count, batch.vocab, "cuda")
        for row, params in enumerate(batch.params):
            start = RowStart(row, 1, 0, b"", b"", params, batch.seeds[row] % (1 << 64), b"")
            self.params.storage[row] = torch.from_numpy(pack_params(start, batch.vocab))
        self.rows = torch.arange(count, dtype=torch.int32, device="cuda")
        self.positions = torch.from_numpy(batch.lengths).cuda()
        self.room = FusedWorkspace(count, batch.vocab, "cuda")

    def sample(self, logits: torch.Tensor, filtered: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(logits)
        return sample_fused(
            logits, self.rows[:count], self.params, self.positions[:count], SingleComm(), 0, self.room, filtered
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", [300, 49152, 128256, 151936])
def test_the_tokens_are_those_of_the_cpu(vocab: int, dtype: torch.dtype) -> None:
    """bfloat16 logits tie by the hundred, so cuts fall between ties."""
    kinds = list(KINDS.values()) * 4
    batch = Batch(vocab, kinds)
    there = Fused(batch)
    for seed, scale in ((0, 3.0), (1, 0.3), (2, 8.0)):
        logits = logits_of(len(kinds), vocab, seed, scale).to(dtype)
        if seed == 1:
            logits[3, 17] = math.nan
            logits[9, 5] = math.inf
        wanted = batch.sample(logits.float())
        tokens, peaks = there.sample(logits.cuda())
        assert tokens.tolist() == wanted.tokens.tolist()
        torch.testing.assert_close(peaks.cpu(), wanted.peaks, rtol=1e-12, atol=1e-12, equal_nan=True)
        some = there.sample(logits[:7].cuda())[0]
        assert some.tolist() == wanted.tokens[:7].tolist()


@pytest.mark.parametrize("kind", ["temperature", "top_k", "top_p", "min_p", "all"])
def test_draws_follow_the_distribution(kind: str) -> None:
    vocab, draws, rows = 60, 60000, 2000
    params = KINDS[kind]
    logits = logits_of(1, vocab, 5, 1.2)
    row = logits[0].double().numpy() / params.temperature
    p = np.exp(row - row.max())
    p[p < params.min_p] = 0
    order = np.argsort(-row)
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    p[order[np.cumsum(p[order]) - p[order] >= params.top_p]] = 0
    expected = p / p.sum() * draws
    counts = np.zeros(vocab)
    there = Fused(Batch(vocab, [params] * rows))
    same = logits.expand(rows, -1).contiguous().cuda()
    for _ in range(draws // rows):
        there.positions += 1
        counts += np.bincount(there.sample(same)[0].cpu().numpy(), minlength=vocab)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    freedom = likely.sum() - 1
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("filtered", [False, True])
def test_inside_a_graph(filtered: bool) -> None:
    """A replay reads logits, rows, positions and parameters as they are then."""
    vocab, count = 32000, 24
    kinds = list(KINDS.values()) if filtered else [KINDS["greedy"], KINDS["temperature"]]
    params = (kinds * count)[:count]
    batch = Batch(vocab, params)
    there = Fused(batch)
    logits = torch.zeros((count, vocab), device="cuda")
    there.sample(logits, filtered)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = there.sample(logits, filtered)
    turned = np.roll(np.arange(count), 5)
    for seed in range(3):
        fresh = logits_of(count, vocab, seed)
        logits.copy_(fresh)
        graph.replay()
        assert tokens.tolist() == batch.sample(fresh).tokens.tolist()
        there.rows.copy_(torch.from_numpy(turned))
        graph.replay()
        assert tokens.tolist() == batch.sample(fresh, rows=turned.tolist()).tokens.tolist()
        there.rows.copy_(torch.arange(count))
        batch.lengths += 1
        there.positions += 1


def test_time() -> None:
    """No bar, but a table (pytest -s): microseconds of a graph's replay, vocabulary of 128,256."""
    vocab = 128256
    print(f"\n{'':12}" + "".join(f"{count:>18}" for count in (1, 32, 256)) + "   rows: fp32 / bf16, us")
    for kind, params in {**KINDS, "argmax": None}.items():
        cells = []
        for count in (1, 32, 256):
            there = Fused(Batch(vocab, [params or KINDS["greedy"]] * count))
            times = []
            for dtype in (torch.float32, torch.bfloat16):
                logits = logits_of(count, vocab, 1).cuda().to(dtype)
                filtered = kind not in ("greedy", "temperature")
                if params is None:
                    times.append(time_of(lambda logits=logits: logits.argmax(-1)))  # type: ignore[misc]
                else:
                    times.append(time_of(lambda there=there, logits=logits, f=filtered: there.sample(logits, f)))  # type: ignore[misc]
            cells.append(f"{times[0]:9.1f}{times[1]:9.1f}")
        print(f"{kind:12}" + "".join(cells))


def time_of(work: object, repeats: int = 50) -> float:
    assert callable(work)
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1000 / repeats
