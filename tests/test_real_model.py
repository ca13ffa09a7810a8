"""SmolLM2-135M-Instruct through real processes, against transformers on the same weights, token for token.

fp32, 20 prompts, 64 tokens. The full set of combinations runs on small checkpoints in test_exactness.py, and on this
model with scripts/check_exactness.py; here are those that only processes show, pairwise.
"""

from __future__ import annotations

import asyncio

import pytest

from treadle import LLM

from .realkit import GREEDY, MODEL, PROMPTS, Outputs, all_at_once, greedy_tokens, load_reference, one_at_a_time

TIGHT = {"num_blocks": 60, "reserve_output": "none"}


@pytest.fixture(scope="module")
def undisturbed(llm: LLM) -> Outputs:
    """Two ranks, depth 2: checked against transformers once; every other combination must equal it."""
    outputs = asyncio.run(all_at_once(llm, aborts=True))
    reference = load_reference()
    for prompt, output in zip(PROMPTS, outputs.greedy, strict=True):
        assert output == greedy_tokens(reference, llm.tokenize(prompt), output), prompt
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 1, "pipeline_depth": 1, "prefix_cache": False, "max_prefill_chunk": 16},
        {"tensor_parallel_size": 3, "pipeline_depth": 2, "max_prefill_chunk": 16, **TIGHT},
        {"tensor_parallel_size": 2, "pipeline_depth": 1, "native": False, **TIGHT},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_combinations_give_the_same_tokens(options: dict[str, object], undisturbed: Outputs) -> None:
    async def main() -> Outputs:
        async with LLM(MODEL, dtype="float32", debug=True, **options) as llm:  # type: ignore[arg-type]
            outputs = await all_at_once(llm, aborts=True)
            stats = await llm.stats()
            assert bool(stats.preemptions) == ("num_blocks" in options)
            assert bool(stats.cached_prompt_tokens) == options.get("prefix_cache", True)
            return outputs

    assert asyncio.run(main()) == undisturbed


def test_one_at_a_time_gives_the_same_tokens(llm: LLM, undisturbed: Outputs) -> None:
    requests = [(prompt, GREEDY) for prompt in PROMPTS[::4]]
    assert asyncio.run(one_at_a_time(llm, requests)) == undisturbed.greedy[::4]
