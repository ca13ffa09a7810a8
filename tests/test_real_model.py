"""SmolLM2-135M-Instruct through real processes, against transformers on the same weights, token for token.

fp32, 20 prompts, 64 tokens. transformers judges by teacher forcing: one forward pass over prompt and output, whose
argmax at each position must be our next token, which makes our output its greedy output. The full set of combinations
runs on small checkpoints in test_exactness.py; here are those that only processes show, pairwise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch
import transformers

from treadle import LLM, SamplingParams
from treadle.engine.config import load_config
from treadle.engine.weights import open_weights
from treadle.models import resolve_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Q: What is 17 + 25?\nA:",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\nx = np.",
    "Water boils at",
    "List five animals:\n1.",
    "In 1969, humans first",
    "The quick brown fox",
    "SELECT name, age FROM",
    "Photosynthesis is the process by which",
    "A haiku about autumn:\n",
    "To make a cup of tea, first",
    "naïve café – déjà vu: the words",
    "The opposite of hot is",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "E = mc^2 means that",
    "x",
)
NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


def seeded(index: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, top_p=0.9, seed=index, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    """transformers' own Llama with the tensors of the same GGUF file."""
    path = resolve_model("smollm2-135m")
    config = load_config(path)
    made = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(made)
    source = open_weights(path, config)
    names = [name for name, _ in model.named_parameters()]
    model = model.to_empty(device="cpu")
    model.load_state_dict({name: source.read(name, torch.float32) for name in names}, strict=False)
    model.tie_weights()
    rotary = type(model.model.rotary_emb)(made)
    model.model.rotary_emb = rotary
    return model.eval()


def greedy_share(model: torch.nn.Module, prompt: Sequence[int], output: Sequence[int]) -> float:
    """Share of positions at which the output token is the argmax."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0]
    expected = logits[len(prompt) - 1 : -1].argmax(-1)
    return float((expected == torch.tensor(output)).float().mean())


async def run(llm: LLM, at_once: int) -> tuple[list[list[int]], list[list[int]]]:
    """(greedy, seeded) tokens of every prompt, with neighbours that are aborted on the way."""
    greedy: list[list[int]] = []
    sampled: list[list[int]] = []
    for start in range(0, len(PROMPTS), at_once):
        part = PROMPTS[start : start + at_once]
        neighbours = [llm.generate(prompt, GREEDY) for prompt in part[:4]] if at_once > 1 else []
        first = [llm.generate(prompt, GREEDY) for prompt in part]
        second = [llm.generate(prompt, seeded(start + i)) for i, prompt in enumerate(part)]
        for neighbour in neighbours:
            await anext(neighbour)
            await neighbour.aclose()
        greedy += [output.token_ids for output in await asyncio.gather(*(stream.final() for stream in first))]
        sampled += [output.token_ids for output in await asyncio.gather(*(stream.final() for stream in second))]
    return greedy, sampled


@pytest.fixture(scope="module")
def undisturbed(llm: LLM, reference: torch.nn.Module) -> tuple[list[list[int]], list[list[int]]]:
    """Two ranks, depth 2: checked against transformers once; every other combination must equal it."""
    greedy, sampled = asyncio.run(run(llm, 16))
    for prompt, output in zip(PROMPTS, greedy, strict=True):
        assert greedy_share(reference, llm.tokenize(prompt), output) == 1.0, prompt
    return greedy, sampled


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 1, "pipeline_depth": 1, "prefix_cache": False, "max_prefill_chunk": 16},
        {"tensor_parallel_size": 3, "pipeline_depth": 2, "max_prefill_chunk": 16, "num_blocks": 60},
        {"tensor_parallel_size": 2, "pipeline_depth": 1, "num_blocks": 60, "native": False},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
def test_combinations_give_the_same_tokens(
    options: dict[str, object], undisturbed: tuple[list[list[int]], list[list[int]]]
) -> None:
    async def main() -> tuple[list[list[int]], list[list[int]]]:
        async with LLM("smollm2-135m", dtype="float32", debug=True, **options) as llm:  # type: ignore[arg-type]
            outputs = await run(llm, 16)
            assert bool((await llm.stats()).preemptions) == (options.get("num_blocks") == 60)
            return outputs

    assert asyncio.run(main()) == undisturbed


def test_one_at_a_time_gives_the_same_tokens(llm: LLM, undisturbed: tuple[list[list[int]], list[list[int]]]) -> None:
    async def main() -> list[list[int]]:
        return [(await llm.generate(prompt, GREEDY).final()).token_ids for prompt in PROMPTS[::4]]

    assert asyncio.run(main()) == undisturbed[0][::4]
