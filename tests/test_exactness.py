"""The same tokens as transformers, whatever the scheduler and the ranks do to a request.

Small random checkpoints of every family, fp32. Greedy output is judged by teacher forcing: transformers sees prompt and
output at once, and its argmax at each position must be our next token, which is the same as its own greedy output.
The real model goes through real processes in test_real_model.py.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
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


def not_greedy(model: torch.nn.Module, tokens: Mapping[int, Sequence[int]]) -> list[int]:
    """Prompts, by their place in `prompts()`, after which transformers would have gone on otherwise. One pass for all.

    What pads a sequence comes after it, and so is not seen by it.
    """
    sequences = {i: torch.tensor([*prompts()[i], *output]) for i, output in tokens.items()}
    with torch.inference_mode():
        logits = model(torch.nn.utils.rnn.pad_sequence(list(sequences.values()), batch_first=True)).logits
    expected = {
        i: row[len(prompts()[i]) - 1 : len(sequence) - 1].argmax(-1).tolist()
        for row, (i, sequence) in zip(logits, sequences.items(), strict=True)
    }
    return [i for i, output in tokens.items() if expected[i] != list(output)]


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """One rank, one request at a time, synchronous, no cache: checked against transformers once."""
    tokens: dict[str, list[int]] = {}
    with LocalGroup(checkpoint, tmp_path_factory.mktemp("shared"), native=False) as group:
        driver = Driver(group, pipeline_depth=1, prefix_cache=False)
        for i, prompt in enumerate(prompts()):
            driver.submit(f"greedy-{i}", prompt, GREEDY)
            driver.run()
            tokens[f"greedy-{i}"] = driver.tokens[f"greedy-{i}", 0]
            driver.submit(f"seeded-{i}", prompt, seeded(i))
            driver.run()
            tokens[f"seeded-{i}"] = driver.tokens[f"seeded-{i}", 0]
    assert not not_greedy(load_reference(checkpoint), {i: tokens[f"greedy-{i}"] for i in range(PROMPTS)})
    assert tokens["greedy-3"] != tokens["seeded-3"]
    return tokens


# Ranks that are threads share no torch.distributed group, so native=False has one rank here; test_comm.py has more.
GROUPS = ((1, True), (2, True), (3, True), (1, False))  # (ranks, native)


def combinations(group: int) -> list[tuple[int, int | None, bool, bool, int, bool]]:
    """(depth, chunk, prefix cache, tight, requests at once, aborts) for one of `GROUPS`.

    With 16 at once: every depth, chunk size, cache and tightness with each other, and aborts as the fifth factor of a
    half-fraction design, so that no pair and no triple is left out. One at a time there is nobody to be preempted for
    and no neighbour to abort: every pair of the other three and the group, as two opposites for each group.
    """
    made: list[tuple[int, int | None, bool, bool, int, bool]] = []
    for depth, chunk, cache, tight in itertools.product((1, 2), (16, None), (True, False), (True, False)):
        aborts = (depth == 1) ^ (chunk is None) ^ cache ^ tight
        made.append((depth, chunk, cache, tight, 16, aborts))
    chunk, cache = ((16, False), (None, True), (16, True), (None, False))[group]
    other = None if chunk else 16
    return [*made, (1, chunk, cache, False, 1, False), (2, other, not cache, False, 1, False)]


@pytest.mark.parametrize("group", range(len(GROUPS)), ids=lambda group: "{}-{}".format(*GROUPS[group]))
def test_every_combination_gives_the_same_tokens(
    checkpoint: Path, undisturbed: dict[str, list[int]], tmp_path: Path, group: int
) -> None:
    """Depth, chunk size, prefix cache, forced preemption, concurrency and aborted neighbours, all with each other.

    A core that gets the same tokens goes through the same states: one group's are checked after every step.
    """
    world_size, native = GROUPS[group]
    with LocalGroup(checkpoint, tmp_path, world_size=world_size, native=native) as ranks:
        for depth, chunk, cache, tight, at_once, aborts in combinations(group):
            combination = f"{depth=} {chunk=} {cache=} {tight=} {at_once=} {aborts=}"
            driver = Driver(
                ranks,
                check=group == 0,
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
    begun: list[str] = []

    def each_step(step: int) -> None:
        """Another takes the place of each that has ended; neighbours leave at steps that only look random."""
        for name in begun if aborts else ():
            if zlib.crc32(f"{name} at {step}".encode()) % 31 == 0:
                driver.core.abort(f"neighbour-of-{name}", 0.0)
        open_ = sum((name, 0) not in driver.finish for name in begun)
        for name, prompt, params in jobs[len(begun) :][: at_once - open_]:
            begun.append(name)
            driver.submit(name, prompt, params)
            if aborts:
                driver.submit(f"neighbour-of-{name}", [*prompt, 7], GREEDY)

    each_step(0)
    driver.run(each_step)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_families_match_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / family, family, tied=tied, seed=3)
    tokens: dict[int, dict[int, list[int]]] = {}
    for world_size in (1, 2):
        shared = tmp_path / f"shared-{world_size}"
        shared.mkdir()
        with LocalGroup(checkpoint, shared, world_size=world_size) as group:
            driver = Driver(group, max_prefill_chunk=16)
            for i, prompt in enumerate(prompts()):
                driver.submit(str(i), prompt, GREEDY)
            driver.run()
        tokens[world_size] = {i: driver.tokens[str(i), 0] for i in range(PROMPTS)}
    assert not not_greedy(load_reference(checkpoint), tokens[1])
    assert tokens[2] == tokens[1]


def test_a_sliding_window_matches_transformers(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "mistral", "mistral", sliding_window=24)
    shared = tmp_path / "shared"
    shared.mkdir()
    with LocalGroup(checkpoint, shared) as group:
        driver = Driver(group, max_prefill_chunk=16)
        driver.submit("long", prompts()[5], GREEDY)
        driver.run()
    assert len(prompts()[5]) + NEW_TOKENS > 24
    assert not not_greedy(load_reference(checkpoint), {5: driver.tokens["long", 0]})


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
