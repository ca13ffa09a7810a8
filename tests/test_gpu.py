"""The same promises on NVIDIA GPUs: `pytest -m gpu` on a machine that has some; recorded in docs/performance.md."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from treadle import LLM, SamplingParams
from treadle.errors import ConfigError

from .modelkit import FAMILIES, load_reference, make_checkpoint

pytestmark = pytest.mark.gpu

PROMPTS = [[1], list(range(40)), [7, 7, 7, 200, 31], list(range(100, 160))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)


async def run(model: Path, **options: object) -> list[list[int]]:
    async with LLM(str(model), device="cuda", dtype="float32", num_blocks=512, **options) as llm:  # type: ignore[arg-type]
        return [(await s.final()).token_ids for s in [llm.generate(prompt, GREEDY) for prompt in PROMPTS]]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_match_transformers(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / family, family)
    reference = load_reference(model).cuda()
    outputs = asyncio.run(run(model, max_prefill_chunk=16))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *output]], device="cuda")).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == output


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3")
    one = asyncio.run(run(model))
    assert asyncio.run(run(model, tensor_parallel_size=2)) == one


def test_more_ranks_than_gpus_is_a_typed_error(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "llama3")
    with pytest.raises(ConfigError, match="needs GPU"):
        asyncio.run(run(model, tensor_parallel_size=torch.cuda.device_count() + 1))
