"""The same tokens as transformers, whatever the scheduler and the ranks do to a request.

Small random checkpoints of every family, fp32. Greedy output is judged by teacher forcing: transformers sees prompt and
output at once, and its argmax at each position must be our next token, which is the same as its own greedy output.
The real model goes through real processes in test_real_model.py.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from treadle.transport.messages import SamplingParams

from .groupkit import Driver, LocalGroup
from .modelkit import FAMILIES, load_reference, make_checkpoint

PROMPTS = 20
NEW_TOKENS = 64
# 16 of these sequences grow to some 14 blocks each: 80 hold a third of them, so more begin than can end undisturbed.
TIGHT_BLOCKS, AMPLE_BLOCKS = 81, 320
MIN_PREEMPTIONS = 10
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


def prompts() -> list[list[int]]:
    """Lengths from 1 to 90; every third continues the one before, so that prefixes are shared."""
    random = np.random.default_rng(5)
    made: list[list[int]] = []
    for i in range(PROMPTS):
        length = int(random.integers(1, 60)) if i else 1
        fresh = random.integers(0, 256, length).tolist()
        made.append(made[-1] + fresh[:30] if i % 3 == 2 else fresh)
    return made


def seeded(index: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.9, top_p=0.95, top_k=40, seed=1000 + index, max_tokens=NEW_TOKENS, ignore_eos=True
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama3"), "llama3")


def is_greedy(model: torch.nn.Module, prompt: Sequence[int], output: Sequence[int]) -> bool:
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0]
    expected = logits[len(prompt) - 1 : -1].argmax(-1)
    return expected.tolist() == list(output)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """One rank, one request at a time, synchronous, no cache: checked against transformers once."""
    model = load_reference(checkpoint)
    tokens: dict[str, list[int]] = {}
    with LocalGroup(checkpoint, tmp_path_factory.mktemp("shared"), native=False) as group:
        driver = Driver(group, pipeline_depth=1, prefix_cache=False)
        for i, prompt in enumerate(prompts()):
            driver.submit(f"greedy-{i}", prompt, GREEDY)
            driver.run()
            tokens[f"greedy-{i}"] = driver.tokens[f"greedy-{i}", 0]
            assert is_greedy(model, prompt, tokens[f"greedy-{i}"]), f"prompt {i} differs from transformers"
            driver.submit(f"seeded-{i}", prompt, seeded(i))
            driver.run()
            tokens[f"seeded-{i}"] = driver.tokens[f"seeded-{i}", 0]
    assert tokens["greedy-3"] != tokens["seeded-3"]
    return tokens


def combinations() -> list[tuple[int, int | None, bool, bool, int, bool]]:
    """(depth, chunk, prefix cache, tight, requests at once, aborts).

    With 16 at once: every depth, chunk size, cache and tightness with each other, and aborts as the fifth factor of a
    half-fraction design, so that no pair and no triple is left out. One at a time there is nobody to be preempted for
    and no neighbour to abort: every pair of the other three.
    """
    made: list[tuple[int, int | None, bool, bool, int, bool]] = []
    for depth, chunk, cache, tight in itertools.product((1, 2), (16, None), (True, False), (True, False)):
        aborts = (depth == 1) ^ (chunk is None) ^ cache ^ tight
        made.append((depth, chunk, cache, tight, 16, aborts))
    made += [(1, 16, False, False, 1, False), (1, None, True, False, 1, False)]
    made += [(2, 16, True, False, 1, False), (2, None, False, False, 1, False)]
    return made


# Ranks that are threads share no torch.distributed group, so native=False has one rank here; test_comm.py has more.
@pytest.mark.parametrize(("world_size", "native"), [(1, True), (2, True), (3, True), (1, False)])
def test_every_combination_gives_the_same_tokens(
    checkpoint: Path, undisturbed: dict[str, list[int]], tmp_path: Path, world_size: int, native: bool
) -> None:
    """Depth, chunk size, prefix cache, forced preemption, concurrency and aborted neighbours, all with each other."""
    with LocalGroup(checkpoint, tmp_path, world_size=world_size, native=native) as group:
        for depth, chunk, cache, tight, at_once, aborts in combinations():
            combination = f"{depth=} {chunk=} {cache=} {tight=} {at_once=} {aborts=}"
            driver = Driver(
                group,
                pipeline_depth=depth,
                max_prefill_chunk=chunk,
                prefix_cache=cache,
                num_blocks=TIGHT_BLOCKS if tight else AMPLE_BLOCKS,
            )
            run_all(driver, at_once, aborts)
            for name in undisturbed if at_once > 1 else [f"greedy-{i}" for i in range(PROMPTS)]:
                assert driver.finish[name, 0] == "length", f"{name} with {combination}"
                assert driver.tokens[name, 0] == undisturbed[name], f"{name} with {combination}"
            stats = driver.core.stats()
            assert stats.preemptions >= MIN_PREEMPTIONS if tight else stats.preemptions == 0, combination
            assert stats.blocks_used == 0, combination


def run_all(driver: Driver, at_once: int, aborts: bool) -> None:
    jobs = [(f"greedy-{i}", prompt, GREEDY) for i, prompt in enumerate(prompts())]
    if at_once > 1:
        jobs += [(f"seeded-{i}", prompt, seeded(i)) for i, prompt in enumerate(prompts())]
    for start in range(0, len(jobs), at_once):
        for job in jobs[start : start + at_once]:
            driver.submit(*job)
            if aborts:
                driver.submit(f"neighbour-of-{job[0]}", [*job[1], 7], GREEDY)

        def abort(step: int, start: int = start) -> None:
            for name, _, _ in jobs[start : start + at_once]:
                if aborts and zlib.crc32(f"{name} at {step}".encode()) % 31 == 0:
                    driver.core.abort(f"neighbour-of-{name}", 0.0)

        driver.run(abort)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_families_match_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / family, family, tied=tied, seed=3)
    model = load_reference(checkpoint)
    for world_size in (1, 2):
        shared = tmp_path / f"shared-{world_size}"
        shared.mkdir()
        with LocalGroup(checkpoint, shared, world_size=world_size) as group:
            driver = Driver(group, max_prefill_chunk=16)
            for i, prompt in enumerate(prompts()):
                driver.submit(str(i), prompt, GREEDY)
            driver.run()
        for i, prompt in enumerate(prompts()):
            assert is_greedy(model, prompt, driver.tokens[str(i), 0]), f"prompt {i} on {world_size} ranks"


def test_a_sliding_window_matches_transformers(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "mistral", "mistral", sliding_window=24)
    model = load_reference(checkpoint)
    shared = tmp_path / "shared"
    shared.mkdir()
    with LocalGroup(checkpoint, shared) as group:
        driver = Driver(group, max_prefill_chunk=16)
        driver.submit("long", prompts()[5], GREEDY)
        driver.run()
    assert len(prompts()[5]) + NEW_TOKENS > 24
    assert is_greedy(model, prompts()[5], driver.tokens["long", 0])


def test_continuations_share_the_prompt_and_differ(checkpoint: Path, tmp_path: Path) -> None:
    prompt = list(range(40))
    with LocalGroup(checkpoint, tmp_path) as group:
        driver = Driver(group)
        driver.submit("many", prompt, SamplingParams(n=4, temperature=1.0, seed=9, max_tokens=20, ignore_eos=True))
        driver.run()
        outputs = [tuple(driver.tokens["many", index]) for index in range(4)]
        assert len(set(outputs)) == 4
        # 39 of 40 tokens could be shared in blocks of 8: the first computes all, the other three find 32.
        assert driver.core.stats().cached_prompt_tokens == 3 * 32
        driver.submit("one", prompt, SamplingParams(temperature=1.0, seed=9, max_tokens=20, ignore_eos=True))
        driver.run()
    assert tuple(driver.tokens["one", 0]) == outputs[0]
