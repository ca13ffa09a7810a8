"""The sampler against straightforward references, and the same for every cut of the vocabulary and every batch."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.engine.comm import Communicator
from treadle.engine.sampling.noise import fold, gumbel_np, hash_ids, noise_keys
from treadle.engine.sampling.sampler import Sampler
from treadle.transport.codec import unpack
from treadle.transport.messages import RowStart, SamplingParams, TokenLogprobs

from .samplingkit import Batch, ThreadComm, cuts_of, on_ranks, same_logprobs

MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1, min_p=0.05),
    SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.01, logprobs=3),
    SamplingParams(temperature=1, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0, logit_bias={3: 5.0, 200: 2.0}, banned_token_ids=[7], logprobs=0),
    SamplingParams(temperature=1, allowed_token_ids=[1, 50, 299, 120], top_p=0.95),
    SamplingParams(temperature=3, top_p=0.999),
    SamplingParams(temperature=1, top_k=270, logprobs=10),
    SamplingParams(temperature=0, min_tokens=4, stop_token_ids=[2]),
]


def logits_of(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((rows, vocab)) * scale).astype(np.float32))


def mixed_batch(vocab: int = 300) -> Batch:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 30, len(MIXED))
    tokens = [rng.integers(0, vocab, n).tolist() for n in lengths]
    return Batch(vocab, MIXED, tokens=tokens, prompt_lens=[max(1, n - 3) for n in lengths], stop_ids=[2, 9])


def filtered_probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The plain way, in float64: temperature, min-p, top-k, top-p, each on what the one before left."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    order = np.lexsort((np.arange(len(p)), -logits.astype(np.float64)))
    if params.top_k > 0:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0 if params.top_p < 1 else p[order[before >= params.top_p]]
    result: np.ndarray = p / p.sum()
    return result


# ── distribution ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1, top_k=6),
        SamplingParams(temperature=1.5, top_p=0.8),
        SamplingParams(temperature=1, min_p=0.1),
        SamplingParams(temperature=1, top_k=10, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=1, logit_bias={4: 1.5}, banned_token_ids=[0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    vocab, draws = 24, 6000
    logits = logits_of(1, vocab, 1.2)
    row = logits[0].numpy().copy()
    for token, bias in (params.logit_bias or {}).items():
        row[token] += bias
    row[params.banned_token_ids or []] = -np.inf
    expected = filtered_probabilities(row, params) * draws
    out = Batch(vocab, [params] * draws, seeds=range(draws)).sample(logits.expand(draws, -1).contiguous())
    counts = np.bincount(out.tokens.numpy(), minlength=vocab)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_positions_of_one_seed_follow_the_distribution() -> None:
    vocab, draws = 16, 6000
    logits = logits_of(1, vocab, 1.0)
    batch = Batch(vocab, [SamplingParams(temperature=1)])
    sampler = Sampler(ThreadCommOfOne(), 0, vocab, vocab, batch.state(), "cpu")
    positions = np.arange(draws)
    out = sampler.sample(logits.expand(draws, -1), np.zeros(draws, np.int64), positions, batch.tokens, positions)
    counts = np.bincount(out.tokens.numpy(), minlength=vocab)
    expected = torch.softmax(logits[0].double(), 0).numpy() * draws
    assert ((counts - expected) ** 2 / expected).sum() < vocab - 1 + 5 * math.sqrt(2 * vocab)


class ThreadCommOfOne(ThreadComm):
    def __init__(self) -> None:
        super().__init__(0, threading.Barrier(1), [None])


# ── filters against the reference ────────────────────────────────────────────────────────────────────────────────────


def reference_token(logits: np.ndarray, params: SamplingParams, seed: int, position: int) -> tuple[int, bool]:
    """The token, and whether rounding leaves it beyond doubt."""
    keys = noise_keys(np.array([seed], np.uint64), np.array([position]))
    noise = gumbel_np(hash_ids(fold(np.arange(len(logits))), keys[0, :1], keys[0, 1:]))
    scores = np.where(
        filtered_probabilities(logits, params) > 0, logits.astype(np.float64) / params.temperature + noise, -np.inf
    )
    shaken = []
    for nudge in (1 - 1e-5, 1 + 1e-5):
        other = SamplingParams(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=min(1.0, params.top_p * nudge) if params.top_p < 1 else 1.0,
            min_p=min(1.0, params.min_p * nudge),
        )
        shaken.append(int((filtered_probabilities(logits, other) > 0).sum()))
    return int(scores.argmax()), shaken[0] == shaken[1]


@settings(max_examples=60, deadline=None)
@given(
    vocab=st.sampled_from([5, 60, 700, 5000]),
    top_k=st.sampled_from([0, 1, 3, 64, 300]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    temperature=st.sampled_from([0.2, 1.0, 5.0]),
    scale=st.sampled_from([0.1, 1.0, 6.0]),
    seed=st.integers(0, 2**63),
)
def test_filters_are_those_of_the_reference(
    vocab: int, top_k: int, top_p: float, min_p: float, temperature: float, scale: float, seed: int
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(4, vocab, scale, seed % 1000)
    batch = Batch(vocab, [params] * 4, seeds=[seed + i for i in range(4)])
    expected = [reference_token(logits[i].numpy(), params, seed + i, 1) for i in range(4)]
    cuts = cuts_of(vocab)[seed % 5]
    for torch_ops in (False, True):
        tokens = batch.sample(logits, cuts, torch_ops=torch_ops).tokens.tolist()
        for token, (wanted, certain) in zip(tokens, expected, strict=True):
            assert token == wanted or not certain


def test_ties_go_to_the_lowest_id() -> None:
    vocab = 5000
    flat = torch.zeros(1, vocab)
    flat[0, 10] = -0.0  # equal to zero, though its bits are not
    for cuts in cuts_of(vocab):
        assert Batch(vocab, [SamplingParams(temperature=0)]).sample(flat, cuts).tokens.tolist() == [0]
        kept = Batch(vocab, [SamplingParams(temperature=1, top_k=11)] * 200).sample(flat.expand(200, -1), cuts).tokens
        assert set(kept.tolist()) == set(range(11))
    late = flat - 1
    late[0, [4000, 4500]] = 5
    for cuts in cuts_of(vocab):
        assert Batch(vocab, [SamplingParams(temperature=0)]).sample(late, cuts).tokens.tolist() == [4000]


def test_flat_rows_grow_their_candidates_to_the_whole_vocabulary() -> None:
    """Where a few hundred candidates hold too little of the mass; every token can be drawn."""
    vocab = 20000
    params = SamplingParams(temperature=1, top_p=0.99)
    batch = Batch(vocab, [params] * 40)
    tokens = batch.sample(logits_of(1, vocab, 0.01).expand(40, -1), [0, 9000, vocab]).tokens
    assert len(set(tokens.tolist())) > 35
    assert (tokens > 9000).any() and (tokens < 9000).any()


# ── one token whatever the cut, the batch, the order ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocab", [300, 4999])
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_every_cut_gives_the_same_bits(vocab: int, scale: float) -> None:
    batch = mixed_batch(vocab)
    logits = logits_of(len(MIXED), vocab, scale)
    whole = batch.sample(logits)
    assert len(whole.logprobs) == 3 and not whole.faults
    for cuts in cuts_of(vocab)[1:]:
        out = batch.sample(logits, cuts)
        assert torch.equal(out.tokens, whole.tokens)
        assert same_logprobs(out.logprobs, whole.logprobs)
    assert torch.equal(batch.sample(logits, torch_ops=True).tokens, whole.tokens)
    assert torch.equal(batch.sample(logits, cuts_of(vocab)[3], torch_ops=True).tokens, whole.tokens)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_neighbours_and_order_do_not_matter(data: st.DataObject) -> None:
    batch = mixed_batch()
    logits = logits_of(len(MIXED), 300)
    alone = batch.sample(logits).tokens
    rows = data.draw(st.lists(st.sampled_from(range(len(MIXED))), min_size=1, max_size=len(MIXED), unique=True))
    out = batch.sample(logits[rows], rows=rows)
    assert torch.equal(out.tokens, alone[rows])


def test_the_seed_and_the_position_decide() -> None:
    vocab = 1000
    logits = logits_of(1, vocab, 1.0).expand(4, -1)
    params = [SamplingParams(temperature=1)] * 4
    known = [[0] * 5, [0] * 5, [0] * 6, [0] * 5]
    tokens = Batch(vocab, params, seeds=[1, 1, 1, -1], tokens=known).sample(logits).tokens.tolist()
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 3


def test_a_row_forgets_its_predecessor() -> None:
    batch = mixed_batch()
    state, fresh = batch.state(), Batch(300, [SamplingParams(temperature=0)] * len(MIXED)).state()
    state.start(7, fresh_start(7))
    fresh.start(7, fresh_start(7))
    assert state.flags[7] == fresh.flags[7] == 0 and 7 not in state.lists and state.logprobs[7] == -1
    state.start(0, fresh_start(0, prompt_logprobs=2))
    assert state.any_prompt_logprobs and state.wants_prompt_logprobs(0)
    state.stop(0)
    assert not state.any_prompt_logprobs and not state.wants_prompt_logprobs(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocab", [300, 49152])
def test_cuda_gives_the_tokens_of_the_cpu(vocab: int) -> None:
    """The integers are exact everywhere, and the logarithms are of 53 bits."""
    batch = mixed_batch(vocab)
    for seed in range(20):
        logits = logits_of(len(MIXED), vocab, seed=seed)
        logits[5, 3] = float("nan") if seed == 1 else 0.0
        here, there = batch.sample(logits), batch.sample(logits, device="cuda")
        assert there.tokens.cpu().tolist() == here.tokens.tolist()
        assert there.faults == here.faults
        for a, b in zip(there.logprobs, here.logprobs, strict=True):
            assert (a.token_id, a.rank, a.top_ids) == (b.token_id, b.rank, b.top_ids)
            assert a.logprob == pytest.approx(b.logprob, abs=2e-6)


def fresh_start(row: int, prompt_logprobs: int | None = None) -> RowStart:
    params = SamplingParams(temperature=0, prompt_logprobs=prompt_logprobs)
    return RowStart(row, 1, 0, b"", b"", params, 0, b"")


def test_greedy_needs_one_small_exchange() -> None:
    vocab = 300
    batch = Batch(vocab, [SamplingParams(temperature=0)] * 8)
    logits = logits_of(8, vocab)

    gathers = []

    def work(comm: Communicator, start: int, count: int) -> None:
        sampler = Sampler(comm, start, count, vocab, batch.state(), "cpu")
        rows = np.arange(8)
        out = sampler.sample(logits[:, start : start + count].contiguous(), rows, rows, batch.tokens, batch.lengths)
        assert out.tokens.tolist() == logits.argmax(-1).tolist()
        if isinstance(comm, ThreadComm):
            gathers.append(comm.gathers)

    on_ranks([0, 100, vocab], work)
    assert gathers == [1, 1]


# ── log-probabilities ────────────────────────────────────────────────────────────────────────────────────────────────


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """Whatever temperature, bias and filters did to the choice."""
    vocab, top = 500, 7
    params = SamplingParams(temperature=2, top_k=30, logit_bias={5: 3.0}, repetition_penalty=1.5, logprobs=top)
    batch = Batch(vocab, [params] * 6, tokens=[[1, 2, 3]] * 6)
    logits = logits_of(6, vocab)
    truth = torch.log_softmax(logits.double(), -1)
    for cuts in cuts_of(vocab):
        out = batch.sample(logits, cuts)
        assert [item.row for item in out.logprobs] == list(range(6))
        for i, item in enumerate(out.logprobs):
            assert item.token_id == out.tokens[i] and item.position == 3
            assert item.logprob == pytest.approx(float(truth[i, item.token_id]), abs=2e-6)
            assert item.rank == int((logits[i] >= logits[i, item.token_id]).sum())
            values, ids = truth[i].topk(top)
            assert unpack(item.top_ids).tolist() == ids.tolist()
            np.testing.assert_allclose(np.frombuffer(item.top_logprobs, "<f4"), values.numpy(), atol=2e-6)


def test_prompt_logprobs() -> None:
    vocab, length = 400, 9
    batch = Batch(vocab, [SamplingParams(prompt_logprobs=2), SamplingParams(prompt_logprobs=0)])
    logits = logits_of(length, vocab)
    targets = torch.arange(length) * 40
    truth = torch.log_softmax(logits.double(), -1)

    def work(comm: Communicator, start: int, count: int) -> list[list[TokenLogprobs]]:
        sampler = Sampler(comm, start, count, vocab, batch.state(), "cpu")
        part = logits[:, start : start + count].contiguous()
        return [sampler.prompt_logprobs(part, row, np.arange(1, length + 1), targets) for row in (0, 1)]

    results = [on_ranks(cuts, work)[0] for cuts in cuts_of(vocab)]
    assert all(result == results[0] for result in results)
    for row, items in enumerate(results[0]):
        for i, item in enumerate(items):
            assert (item.row, item.position, item.token_id) == (row, i + 1, int(targets[i]))
            assert item.logprob == pytest.approx(float(truth[i, targets[i]]), abs=2e-6)
            assert len(unpack(item.top_ids)) == (2 if row == 0 else 0)


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("torch_ops", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf")])
def test_a_faulty_row_fails_alone(poison: float, torch_ops: bool) -> None:
    batch = mixed_batch()
    logits = logits_of(len(MIXED), 300)
    good = batch.sample(logits, torch_ops=torch_ops)
    for bad in range(len(MIXED)):
        spoilt = logits.clone()
        spoilt[bad, 120] = poison  # a token that every row may choose
        for cuts in ([0, 300], [0, 100, 300], [0, 200, 300]):
            out = batch.sample(spoilt, cuts, torch_ops=torch_ops)
            assert [fault.row for fault in out.faults] == [bad]
            assert ("NaN" in out.faults[0].message) == (poison != poison)
            assert out.tokens[bad] == 0
            others = [i for i in range(len(MIXED)) if i != bad]
            assert torch.equal(out.tokens[others], good.tokens[others])
            assert bad not in [item.row for item in out.logprobs]


@pytest.mark.parametrize("extra", [{}, {"top_p": 0.9}, {"top_k": 3}, {"temperature": 0.0}], ids=str)
def test_a_row_with_nothing_allowed_fails_alone(extra: dict[str, float]) -> None:
    vocab = 20
    params = SamplingParams(**{"temperature": 1.0, "banned_token_ids": list(range(vocab)), **extra})  # type: ignore[arg-type]
    batch = Batch(vocab, [SamplingParams(temperature=0), params, SamplingParams(temperature=1)])
    logits = logits_of(3, vocab)
    for cuts in cuts_of(vocab):
        out = batch.sample(logits, cuts)
        assert [fault.row for fault in out.faults] == [1] and "banned" in out.faults[0].message
        assert out.tokens[0] == logits[0].argmax() and out.tokens[1] == 0
