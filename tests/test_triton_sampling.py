"""The fused sampler against the sampler of the CPU: the same tokens for the same logits and seeds."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.engine.comm import Communicator, SingleComm
from treadle.transport.messages import RowStart, SamplingParams

from .samplingkit import Batch, cuts_of, on_ranks
from .tritonkit import DEVICE

import triton  # isort: skip
import triton.language as tl  # isort: skip

from treadle.engine.kernels import sampling as kernels  # isort: skip
from treadle.engine.sampling.fused import DeviceParams, FusedWorkspace, sample_fused  # isort: skip
from treadle.engine.sampling.noise import gumbel  # isort: skip

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1, min_p=0.05),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.01),
    SamplingParams(temperature=0.01),
    SamplingParams(temperature=3, top_p=0.999),
]
SECONDS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


class OneAtATime:
    """A communicator whose rank computes only while it holds the lock: Triton's interpreter is not for threads."""

    def __init__(self, inner: Communicator, lock: threading.Lock) -> None:
        self.rank, self.world_size = inner.rank, inner.world_size
        self.exchanges = 0
        self._inner, self._lock = inner, lock

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.exchanges += 1
        x = x.cpu()
        self._lock.release()
        try:
            every = self._inner.all_gather(x)
        finally:
            self._lock.acquire()
        return every.to(DEVICE)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def barrier(self) -> None:
        raise NotImplementedError


def fused(
    batch: Batch,
    logits: torch.Tensor,
    cuts: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    tile: int = 256,
    filtered: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens and peaks of `rows` (all by default), on the CPU; all ranks must agree."""
    chosen = list(range(len(batch.params))) if rows is None else list(rows)
    params = DeviceParams.empty(len(batch.params), batch.vocab, DEVICE)
    for row, one in enumerate(batch.params):
        params.write(row, RowStart(row, 1, 0, b"", b"", one, batch.seeds[row] % (1 << 64), b""))
    lock = threading.Lock()

    def work(comm: Communicator, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        with lock:
            room = FusedWorkspace(len(chosen) + 1, count, DEVICE, filtered, tile)
            poison(room)
            tokens, peaks = sample_fused(
                logits[:, start : start + count].to(DEVICE).contiguous(),
                torch.tensor(chosen, dtype=torch.int32, device=DEVICE),
                params,
                torch.from_numpy(batch.lengths[chosen]).to(DEVICE),
                OneAtATime(comm, lock),
                start,
                room,
                filtered,
            )
            return tokens.cpu(), peaks.cpu()

    outs = on_ranks(cuts or [0, batch.vocab], work)
    for tokens, peaks in outs[1:]:
        assert torch.equal(tokens, outs[0][0])
        assert torch.equal(peaks.nan_to_num(nan=7.0), outs[0][1].nan_to_num(nan=7.0))
    return outs[0]


def poison(room: FusedWorkspace) -> None:
    """What nobody wrote must not be read."""
    for value in vars(room).values():
        if isinstance(value, torch.Tensor):
            value.fill_(float("nan") if value.is_floating_point() else 0x55555555)


def check(batch: Batch, logits: torch.Tensor, cuts: Sequence[int] | None = None, tile: int = 256) -> torch.Tensor:
    """The fused sampler's choice and score are the other one's."""
    wanted = batch.sample(logits.float())
    tokens, peaks = fused(batch, logits, cuts, tile=tile)
    assert tokens.tolist() == wanted.tokens.tolist()
    torch.testing.assert_close(peaks, wanted.peaks, rtol=1e-12, atol=1e-12, equal_nan=True)
    return tokens


def logits_of(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((rows, vocab)) * scale).astype(np.float32))


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_every_cut_gives_the_tokens_of_the_cpu(scale: float) -> None:
    vocab = 700
    batch = Batch(vocab, MIXED)
    logits = logits_of(len(MIXED), vocab, scale)
    for cuts in cuts_of(vocab)[:: 1 if scale > 1 else 2]:
        check(batch, logits, cuts)


@settings(max_examples=10, **SECONDS)
@given(
    vocab=st.sampled_from([5, 60, 700]),
    top_k=st.sampled_from([0, 1, 3, 64, 300]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    temperature=st.sampled_from([0.01, 0.2, 1.0, 5.0]),
    scale=st.sampled_from([0.1, 1.0, 6.0, 1e4]),
    kind=st.sampled_from(["float32", "bfloat16", "whole", "gaps"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_filters_are_those_of_the_cpu(
    vocab: int, top_k: int, top_p: float, min_p: float, temperature: float, scale: float, kind: str, seed: int
) -> None:
    """With ties of many tokens (rounded logits) and tokens that cannot be chosen (gaps)."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(2, vocab, scale, seed % 1000)
    if kind == "bfloat16":
        logits = logits.bfloat16()
    elif kind == "whole":
        logits = logits.round()
    elif kind == "gaps":
        logits[:, np.random.default_rng(seed).random(vocab) < 0.5] = -math.inf
        logits[:, vocab // 2] = 0.0
    batch = Batch(vocab, [params] * 2, seeds=[(seed + i) % (1 << 64) for i in range(2)])
    check(batch, logits, cuts_of(vocab)[seed % 5], tile=[64, 256][seed % 2])


def test_ties_go_to_the_lowest_id() -> None:
    vocab = 800
    flat = torch.zeros(1, vocab)
    flat[0, 10] = -0.0  # equal to zero, though its bits are not
    late = flat - 1
    late[0, [400, 700]] = 5
    kept = Batch(vocab, [SamplingParams(temperature=1, top_k=11)] * 2 + [SamplingParams(temperature=1, top_p=0.4)])
    for cuts in cuts_of(vocab):
        greedy = Batch(vocab, [SamplingParams(temperature=0)])
        assert check(greedy, flat, cuts).tolist() == [0]
        assert check(greedy, late, cuts).tolist() == [400]
        tokens = check(kept, flat.expand(3, -1), cuts)
        assert tokens[:2].max() < 11 and tokens[2] < 321


@settings(max_examples=8, **SECONDS)
@given(st.data())
def test_neighbours_and_order_do_not_matter(data: st.DataObject) -> None:
    vocab = 300
    batch = Batch(vocab, MIXED)
    logits = logits_of(len(MIXED), vocab)
    rows = data.draw(st.lists(st.sampled_from(range(len(MIXED))), min_size=1, max_size=len(MIXED), unique=True))
    tokens, _ = fused(batch, logits[rows], rows=rows)
    assert tokens.tolist() == batch.sample(logits).tokens[rows].tolist()


def test_rows_without_filters_need_no_search_and_one_exchange() -> None:
    """The same tokens whether or not the launches of the filters are there."""
    vocab = 900
    batch = Batch(vocab, [SamplingParams(temperature=0), SamplingParams(temperature=1), SamplingParams(temperature=2)])
    logits = logits_of(3, vocab)
    for cuts in ([0, vocab], [0, 500, vocab]):
        plain, searched = (fused(batch, logits, cuts, filtered=filtered) for filtered in (False, True))
        assert plain[0].tolist() == searched[0].tolist() == batch.sample(logits).tokens.tolist()
        assert plain[1].tolist() == searched[1].tolist()


@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
def test_a_faulty_row_fails_alone(poison: float) -> None:
    vocab = 300
    batch = Batch(vocab, MIXED)
    logits = logits_of(len(MIXED), vocab)
    good = batch.sample(logits).tokens
    for bad in (1, 3, 5):
        spoilt = logits.clone()
        spoilt[bad, 120] = poison
        if poison != poison:
            spoilt[bad, 7] = math.inf  # NaN is the graver
        tokens, peaks = fused(batch, spoilt, [[0, vocab], [0, 100, vocab]][poison > 0])
        assert tokens[bad] == 0 and not math.isfinite(peaks[bad])
        assert math.isnan(peaks[bad]) == math.isnan(poison)
        others = [i for i in range(len(MIXED)) if i != bad]
        assert torch.equal(tokens[others], good[others]) and bool(peaks[others].isfinite().all())


def test_a_row_without_a_possible_token_fails_alone() -> None:
    vocab = 300
    batch = Batch(vocab, MIXED)
    logits = logits_of(len(MIXED), vocab)
    for cuts in ([0, vocab], [0, 100, vocab]):
        for bad in (0, 5):
            spoilt = logits.clone()
            spoilt[bad] = -math.inf
            tokens = check(batch, spoilt, cuts)
            assert tokens[bad] == 0


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
def test_extreme_logits(temperature: float) -> None:
    """Bounds that leave float32, and scores that differ in their last digits."""
    vocab = 300
    params = [SamplingParams(temperature=temperature, top_k=k) for k in (0, 0, 0, 0, 20)]
    logits = logits_of(5, vocab)
    logits[0] *= 1e37
    logits[1] = -3.4e38
    logits[2] = 1e6 + logits_of(1, vocab)[0]
    logits[3] *= 1e-38
    logits[4] = -1e30 * logits[4].abs()
    for cuts in ([0, vocab], [0, 100, vocab]):
        check(Batch(vocab, params), logits, cuts)


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=1), SamplingParams(temperature=1.5, top_p=0.8)], ids=["plain", "top_p"]
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    """A small sample; that of many draws is made on GPUs."""
    vocab, draws = 6, 120
    logits = logits_of(1, vocab, 0.8)
    expected = torch.softmax(logits[0].double() / params.temperature, 0)
    best_first, order = expected.sort(descending=True)
    expected[order[best_first.cumsum(0) - best_first >= params.top_p]] = 0
    expected *= draws / expected.sum()
    tokens, _ = fused(Batch(vocab, [params] * draws, seeds=range(draws)), logits.expand(draws, -1), tile=16)
    counts = torch.bincount(tokens, minlength=vocab)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    freedom = int(likely.sum()) - 1
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_a_wrong_workspace_is_refused() -> None:
    batch = Batch(40, [SamplingParams(temperature=1, top_k=3)])
    logits = logits_of(1, 40)
    params = DeviceParams.empty(1, 40, DEVICE)
    rows, positions = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    for room, filtered in ((FusedWorkspace(1, 30, DEVICE), True), (FusedWorkspace(1, 40, DEVICE, False), True)):
        with pytest.raises(ValueError, match="workspace"):
            sample_fused(logits, rows, params, positions, SingleComm(), 0, room, filtered)
    assert fused(batch, logits)[0].shape == (1,)


@triton.jit
def _noises(words, bounds, exact, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    word = tl.load(words + index).to(tl.uint32)
    tl.store(bounds + index, kernels.noise_bound(word))
    tl.store(exact + index, kernels.exact_noise(word))


def test_the_bound_on_the_noise_holds() -> None:
    """On the smallest and the largest words, on all powers of two and between."""
    count = 1 << 14
    ends = torch.cat([torch.arange(1000), (1 << 32) - 1 - torch.arange(1000), 2 ** torch.arange(32)])
    rest = np.random.default_rng(3).integers(0, 1 << 32, count - len(ends))
    words = torch.cat([ends, torch.from_numpy(rest)]).to(DEVICE)
    bounds = torch.empty(count, device=DEVICE)
    exact = torch.empty(count, dtype=torch.float64, device=DEVICE)
    _noises[(1,)](words, bounds, exact, COUNT=count)
    torch.testing.assert_close(exact.cpu(), gumbel(words.cpu()), rtol=4e-15, atol=4e-15)
    above = bounds.double() - exact
    assert above.min() > -5e-5
    assert above[exact > 3].max() < 0.02
