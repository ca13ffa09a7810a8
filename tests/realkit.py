"""SmolLM2-135M-Instruct: prompts, ways to put them through an `LLM`, and transformers' model of the same weights.

transformers judges by teacher forcing: one forward pass over prompt and output, whose argmax at each position must be
our next token, which makes our output its greedy output.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import transformers

from treadle import LLM, SamplingParams, Stream
from treadle.engine.config import load_config
from treadle.engine.weights import open_weights
from treadle.models import resolve_model

MODEL = "smollm2-135m"
# Shared, and longer than a chunk of 16 and a block of 16: what chunks and the prefix cache must not change.
PREAMBLE = (
    "Below is a conversation between a curious person and a patient librarian, who answers in short, plain sentences "
    "and never guesses.\n\n"
)
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    PREAMBLE + "Q: What is 17 + 25?\nA:",
    "The three primary colours are",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\nx = np.",
    PREAMBLE + "Q: At what temperature does water boil?\nA: Water boils at",
    "List five animals:\n1.",
    "In 1969, humans first",
    "The quick brown fox",
    "SELECT name, age FROM",
    PREAMBLE + "Q: How do plants live?\nA: Photosynthesis is the process by which",
    "A haiku about autumn:\n",
    "To make a cup of tea, first" + " fill the kettle, then boil the water, then warm the pot, and then" * 5,
    "naïve café – déjà vu: the words",
    PREAMBLE + "Q: What is the opposite of hot?\nA: The opposite of hot is",
    "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
    "E = mc^2 means that",
    "x",
)
NEW_TOKENS = 64
SEEDED_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
_NEIGHBOURS = PROMPTS[::3]


@dataclass(frozen=True)
class Outputs:
    """Token ids for each prompt."""

    greedy: list[list[int]]
    seeded: list[list[int]]


def seeded(index: int, tokens: int = SEEDED_TOKENS) -> SamplingParams:
    return SamplingParams(temperature=0.8, top_p=0.9, seed=index, max_tokens=tokens, ignore_eos=True)


async def all_at_once(llm: LLM, aborts: bool) -> Outputs:
    """Every prompt greedy and seeded, as many at once as the LLM has rows.

    aborts: among them go neighbours that are left at different points, the first before it has begun.
    """
    leaving = [_leave(llm.generate(prompt, GREEDY), 9 * i) for i, prompt in enumerate(_NEIGHBOURS) if aborts]
    streams = [llm.generate(prompt, GREEDY) for prompt in PROMPTS]
    streams += [llm.generate(prompt, seeded(i)) for i, prompt in enumerate(PROMPTS)]
    ends = asyncio.gather(*(stream.final() for stream in streams))
    await asyncio.gather(*leaving)
    tokens = [output.token_ids for output in await ends]
    return Outputs(tokens[: len(PROMPTS)], tokens[len(PROMPTS) :])


async def one_at_a_time(llm: LLM, requests: Iterable[tuple[str, SamplingParams]]) -> list[list[int]]:
    return [(await llm.generate(prompt, params).final()).token_ids for prompt, params in requests]


async def _leave(stream: Stream, tokens: int) -> None:
    if tokens:
        async for output in stream:
            if len(output.token_ids) >= tokens:
                break
    await stream.aclose()


def load_reference() -> torch.nn.Module:
    """transformers' own Llama with the tensors of the same GGUF file, float32."""
    path = resolve_model(MODEL)
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
    model.model.rotary_emb = type(model.model.rotary_emb)(made)  # its buffers were made on "meta"
    return model.eval()


def greedy_tokens(model: torch.nn.Module, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """What transformers would say at each position of `output`, given all before it."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0]
    return [int(token) for token in logits[len(prompt) - 1 : -1].argmax(-1)]
