"""The GPU's way to run a step, on a CPU: rows beside the model, padded decode steps, steps that overlap.

The same tokens as the CPU's own runner, which test_exactness.py has checked against transformers. What needs a GPU, the
graphs and the kernels, is in test_gpu_runner.py and test_triton_*.py.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from treadle.engine.cuda.device_rows import DeviceRows
from treadle.engine.cuda.graphs import ladder
from treadle.engine.cuda.program import TURNS
from treadle.engine.cuda.row_ops import TorchRowOps
from treadle.engine.cuda.staging import Field, Layout, Staging
from treadle.engine.loading import Emulate
from treadle.transport.codec import pack
from treadle.transport.messages import Configure, RowStart, SamplingParams, StepPlan, StepResult

from .groupkit import Driver, LocalGroup, Overlapped, Requests, configure_for
from .modelkit import make_checkpoint
from .test_exactness import run_all
from .vocabulary import VOCAB_SIZE

CPU = torch.device("cpu")
NEW_TOKENS = 24
EMULATE: tuple[Emulate, ...] = ("", "rows")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama3"), "llama3")


def requests() -> Requests:
    """Greedy, drawn, filtered, and all that the fused sampler leaves to the other one, of lengths from 1 to 80."""
    random = np.random.default_rng(8)
    kinds: list[dict[str, object]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
        {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.3},
        {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2},
        {"temperature": 0.9, "min_tokens": 9, "stop_token_ids": [5, 9, 77, 120]},
        {"temperature": 0.0, "logit_bias": {7: 5.0}, "banned_token_ids": [9, 10]},
    ]
    made: Requests = []
    for index in range(16):
        length = 1 if index in (0, 9) else int(random.integers(2, 60))
        prompt = random.integers(0, 256, length).tolist()
        if index % 3 == 2:
            prompt = made[-1][1] + prompt[:20]
        kind = {"max_tokens": NEW_TOKENS, "seed": 100 + index, "ignore_eos": True, **kinds[index % len(kinds)]}
        made.append((f"request-{index}", prompt, SamplingParams(**kind)))  # type: ignore[arg-type]
    return made


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """One at a time, by the CPU's runner."""
    tokens = {}
    with LocalGroup(checkpoint, tmp_path_factory.mktemp("expected")) as group:
        for request in requests():
            driver = Driver(group, prefix_cache=False, pipeline_depth=1)
            driver.submit(*request)
            driver.run()
            tokens[request[0]] = driver.tokens[request[0], 0]
    return tokens


@pytest.mark.parametrize("world_size", [1, 2])
def test_it_gives_the_tokens_of_the_cpu_runner(
    checkpoint: Path, expected: dict[str, list[int]], tmp_path: Path, world_size: int
) -> None:
    """Depth, chunks, prefix cache and preemption, every pair of them; rows are used again all the time."""
    with LocalGroup(checkpoint, tmp_path, world_size=world_size, emulate="rows", max_num_seqs=6) as group:
        for depth, chunk, cache in itertools.product((1, 2), (7, None), (True, False)):
            tight = (depth == 1) ^ (chunk is None) ^ cache
            combination = f"{depth=} {chunk=} {cache=} {tight=}"
            driver = Driver(
                group,
                pipeline_depth=depth,
                max_prefill_chunk=chunk,
                prefix_cache=cache,
                num_blocks=25 if tight else 512,
            )
            for request in requests():
                driver.submit(*request)
            driver.run()
            for name, tokens in expected.items():
                assert driver.tokens[name, 0] == tokens, f"{name} with {combination}"
            assert driver.core.stats().preemptions > 0 or not tight, combination


@pytest.mark.parametrize("depth", [2, 4])
def test_steps_overlap_and_tokens_stay_on_the_device(
    checkpoint: Path, expected: dict[str, list[int]], tmp_path: Path, depth: int
) -> None:
    overlapped = Overlapped(configure_for(checkpoint, tmp_path, max_num_seqs=6), "rows")
    assert overlapped.run(requests(), depth) == expected
    assert overlapped.most == depth
    assert overlapped.run(requests(), depth, num_blocks=25, max_prefill_chunk=7) == expected
    assert (
        overlapped.run(requests()[:8], depth, prefix_cache=False, max_num_batched_tokens=8).items() <= expected.items()
    )


def test_other_combinations_agree_too(checkpoint: Path, tmp_path: Path) -> None:
    """What test_exactness.py runs, with aborted neighbours, against the CPU's runner."""
    results = []
    for emulate in EMULATE:
        shared = tmp_path / f"shared-{emulate}"
        shared.mkdir()
        with LocalGroup(checkpoint, shared, emulate=emulate) as group:
            driver = Driver(group, num_blocks=41, max_prefill_chunk=16)
            run_all(driver, 16, aborts=True)
            results.append({key: tokens for key, tokens in driver.tokens.items() if "neighbour" not in key[0]})
    assert results[0] == results[1]


def test_log_probabilities_are_those_of_the_cpu_runner(checkpoint: Path, tmp_path: Path) -> None:
    chosen = [request for request in requests() if request[2].logprobs is not None]
    found = []
    for emulate in EMULATE:
        shared = tmp_path / f"shared-{emulate}"
        shared.mkdir()
        with LocalGroup(checkpoint, shared, emulate=emulate) as group:
            seen: list[tuple[object, ...]] = []
            driver = Driver(group, max_prefill_chunk=16)
            step = group.step

            def watched(frame: bytes, masks: bytes, step=step, seen=seen) -> StepResult:  # type: ignore[no-untyped-def]
                result = step(frame, masks)
                seen += [(item.position, item.token_id, item.rank, round(item.logprob, 4)) for item in result.logprobs]
                return result

            group.step = watched  # type: ignore[method-assign]
            for request in chosen:
                driver.submit(*request)
            driver.run()
            found.append(sorted(seen))
    assert found[0] == found[1]
    assert len(found[0]) > NEW_TOKENS * len(chosen)


def test_a_fault_is_one_rows_own(checkpoint: Path, tmp_path: Path) -> None:
    everything = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, allowed_token_ids=[])
    plain = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with LocalGroup(checkpoint, tmp_path, emulate="rows") as group:
        driver = Driver(group)
        driver.submit("bad", [1, 2, 3], everything)
        driver.submit("good", [1, 2, 3], plain)
        driver.run()
        assert (driver.finish["bad", 0], driver.finish["good", 0]) == ("error", "length")
        assert len(driver.tokens["good", 0]) == 4


def test_too_many_open_steps_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    runner = Overlapped(configure_for(checkpoint, tmp_path), "rows").runner
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    start = RowStart(0, 1, 0, pack([3]), pack([1, 2, 3]), params, 1, b"")
    first = StepPlan(0, b"", [start], b"", b"", pack([0]), pack([1]))
    then = StepPlan(1, b"", [], b"", b"", pack([0]), pack([1]))
    tickets = [runner.submit(first)]
    tickets += [runner.submit(then) for _ in range(TURNS - 1)]
    with pytest.raises(RuntimeError, match="open"):
        runner.submit(then)
    one_by_one = [int(runner.collect(ticket).tokens[0]) for ticket in tickets]
    assert len(one_by_one) == TURNS


# ── its parts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_ladder_ends_where_it_should() -> None:
    assert ladder(1) == [1]
    assert ladder(3) == [1, 2, 3]
    assert ladder(8) == [1, 2, 4, 8]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    sizes = ladder(1000)
    assert sizes[-1] == 1000 and len(sizes) < 40
    assert {24, 64, 80, 256, 288, 512, 576} <= set(sizes) and not {72, 272, 544} & set(sizes)
    assert all(a < b for a, b in itertools.pairwise(sizes))


def test_a_packet_arrives_as_it_was_written() -> None:
    staging = Staging(100, 3, CPU)
    layout = Layout([Field(3, True), Field(5, False), Field(0, False), Field(2, True)], base=4)
    for turn in range(7):
        arrays = layout.host(staging.take())
        for index, array in enumerate(arrays):
            array[:] = np.arange(len(array)) + 10 * index + turn
        staging.send(layout.end)
        for index, tensor in enumerate(layout.device(staging.device)):
            assert tensor.tolist() == [value + 10 * index + turn for value in range(len(tensor))]
            assert tensor.storage_offset() * tensor.element_size() % 16 == 0


def test_rows_take_prompts_longer_than_a_buffer_and_many_at_once() -> None:
    rows = DeviceRows(40, 20_000, 16, VOCAB_SIZE, TorchRowOps(), CPU)
    random = np.random.default_rng(1)
    starts = []
    for row in range(40):
        tokens = random.integers(0, VOCAB_SIZE, int(random.integers(1, 20_000)))
        blocks = random.integers(1, 1000, math.ceil(len(tokens) / 16))
        params = SamplingParams(temperature=0.5, top_k=row)
        starts.append(RowStart(row, len(tokens), 0, pack(tokens), pack(blocks), params, row, b""))
    rows.start(starts)
    for start in starts:
        tokens, blocks = np.frombuffer(start.tokens, "<i4"), np.frombuffer(start.blocks, "<i4")
        assert rows.history[start.row, : len(tokens)].tolist() == tokens.tolist()
        assert rows.table[start.row, : len(blocks)].tolist() == blocks.tolist()
    rows.grow(np.array([3, 3, 8]), np.array([5, 6, 0]), np.array([11, 12, 13], np.int32))
    assert (rows.table[3, 5:7].tolist(), rows.table[8, 0].item()) == ([11, 12], 13)
    assert not rows.table[rows.spare].any()


def test_a_configure_from_before_still_decodes() -> None:
    """The switches of GPUs have defaults."""
    fields = {field.name: field.default for field in msgspec.structs.fields(Configure)}
    assert fields["cuda_graphs"] is True and fields["overlap"] is True
