"""Bias, allowed and banned ids, minimum length and penalties against a plain loop over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treadle.engine.sampling.penalties import LogitEditor
from treadle.transport.messages import SamplingParams

from .samplingkit import Batch, cuts_of

VOCAB = 40


def plain(logits: list[float], params: SamplingParams, known: list[int], prompt: int, stop: list[int]) -> list[float]:
    """vLLM's formulas, a token at a time."""
    out = list(logits)
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    if params.allowed_token_ids is not None:
        out = [x if t in params.allowed_token_ids else -math.inf for t, x in enumerate(out)]
    for token in params.banned_token_ids or []:
        out[token] = -math.inf
    if len(known) - prompt < params.min_tokens:
        for token in stop:
            out[token] = -math.inf
    for token in range(len(out)):
        if token in known:
            r = params.repetition_penalty
            out[token] = out[token] / r if out[token] > 0 else out[token] * r
        count = known[prompt:].count(token)
        out[token] -= params.frequency_penalty * count
        out[token] -= params.presence_penalty * (count > 0)
    return out


ids = st.integers(0, VOCAB - 1)
rows = st.lists(
    st.tuples(
        st.builds(
            SamplingParams,
            temperature=st.just(0.0),
            repetition_penalty=st.sampled_from([1.0, 0.5, 1.7]),
            presence_penalty=st.sampled_from([0.0, -1.0, 0.75]),
            frequency_penalty=st.sampled_from([0.0, -0.5, 1.25]),
            min_tokens=st.integers(0, 4),
            logit_bias=st.none() | st.dictionaries(ids, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4),
            allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=10),
            banned_token_ids=st.none() | st.lists(ids, max_size=5),
        ),
        st.lists(ids, min_size=1, max_size=20),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=80, deadline=None)
@given(rows=rows, stop=st.lists(ids, max_size=3, unique=True), cut=st.integers(0, VOCAB), seed=st.integers(0, 99))
def test_edits_are_those_of_the_plain_loop(
    rows: list[tuple[SamplingParams, list[int], int]], stop: list[int], cut: int, seed: int
) -> None:
    known = [tokens for _, tokens, _ in rows]
    prompts = [min(prompt, len(tokens)) for _, tokens, prompt in rows]
    batch = Batch(VOCAB, [params for params, _, _ in rows], tokens=known, prompt_lens=prompts, stop_ids=stop)
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy((rng.standard_normal((len(rows), VOCAB)) * 4).astype(np.float32))
    expected = torch.tensor(
        [plain(logits[i].tolist(), p, known[i], prompts[i], stop) for i, (p, _, _) in enumerate(rows)]
    )
    parts = []
    for start, end in ((0, cut), (cut, VOCAB)):
        editor = LogitEditor(batch.state(), start, end - start)
        part = logits[:, start:end].contiguous()
        parts.append(editor.edit(part, np.arange(len(rows)), batch.lengths, batch.tokens, batch.lengths))
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-6, atol=1e-6)


def test_rows_without_edits_cost_no_copy() -> None:
    batch = Batch(VOCAB, [SamplingParams(temperature=1, top_p=0.5), SamplingParams(min_tokens=2)], stop_ids=[])
    logits = torch.zeros(2, VOCAB)
    editor = LogitEditor(batch.state(), 0, VOCAB)
    assert editor.edit(logits, np.arange(2), batch.lengths, batch.tokens, batch.lengths) is logits


def test_tokens_beyond_the_known_length_are_not_read() -> None:
    """The mirror may hold anything there."""
    params = SamplingParams(temperature=0, repetition_penalty=5.0, presence_penalty=1.0)
    batch = Batch(VOCAB, [params, params], tokens=[[1, 2], [1] * 12], prompt_lens=[1, 1])
    batch.tokens[0, 2:] = 5
    logits = torch.ones(2, VOCAB)
    editor = LogitEditor(batch.state(), 0, VOCAB)
    edited = editor.edit(logits, np.arange(2), batch.lengths, batch.tokens, batch.lengths)
    assert edited[0, 5] == 1 and edited[0, 1] == pytest.approx(0.2) and edited[0, 2] == pytest.approx(-0.8)


def test_stop_tokens_are_banned_until_min_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4] = 9.0, 5.0
    params = SamplingParams(temperature=0, min_tokens=2)
    for written, expected in ((0, 4), (1, 4), (2, 3), (3, 3)):
        batch = Batch(VOCAB, [params], tokens=[[7] * (2 + written)], prompt_lens=[2], stop_ids=[3])
        for cuts in cuts_of(VOCAB):
            assert batch.sample(logits, cuts).tokens.tolist() == [expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 4}])
def test_lists_hold_in_every_path(temperature: float, filters: dict[str, float]) -> None:
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.standard_normal((50, VOCAB)).astype(np.float32))
    allowed, banned = [1, 5, 30, 39], [5, 30]
    params = SamplingParams(temperature=temperature, allowed_token_ids=allowed, banned_token_ids=banned, **filters)  # type: ignore[arg-type]
    assert set(Batch(VOCAB, [params] * 50).sample(logits, [0, 20, VOCAB]).tokens.tolist()) == {1, 39}
    forced = SamplingParams(temperature=temperature, logit_bias={17: 100.0}, **filters)  # type: ignore[arg-type]
    assert set(Batch(VOCAB, [forced] * 50).sample(logits, [0, 20, VOCAB]).tokens.tolist()) == {17}
