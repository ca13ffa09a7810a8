"""Blocks that leave a real engine and come back: the bytes, the refusals, and the same tokens whatever was swapped.

What needs a GPU is in test_gpu_swap.py; its copies through a staging buffer run here on a CPU, in order.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.groupkit import Driver, LocalGroup, Overlapped, Requests, configure_for
from tests.modelkit import make_checkpoint
from treadle import LLM
from treadle.engine.config import load_config
from treadle.engine.cuda.swap import StagedBlocks, runs, staging_blocks
from treadle.engine.host_memory import host_blocks, make_copies, reserve_staging
from treadle.engine.kv import KVCache, bytes_per_block
from treadle.engine.sharding import shard_for
from treadle.engine.swap import BlockCopies, HostBlocks, measure
from treadle.errors import ConfigError, DoesNotFit, ProtocolError
from treadle.scheduler.cost_model import CostModel, StepCosts
from treadle.scheduler.replay import replay
from treadle.transport.codec import pack
from treadle.transport.messages import SamplingParams, StepPlan

CPU = torch.device("cpu")
BLOCKS, HOST = 24, 11
# As in test_swapping.py, for blocks of 8: what stands at the beginning of a sequence is computed again.
LONG_ONLY = StepCosts(prefill_token=1e-3, chunk_pair=1e-4, block_out=14e-3, block_in=14e-3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama3"), "llama3")


def cache(checkpoint: Path, dtype: torch.dtype = torch.float32, block_size: int = 8) -> KVCache:
    """Each block holds its own number everywhere, layer and kind as its fraction."""
    config = load_config(checkpoint)
    shard = shard_for(config, 0, 1)
    kv = KVCache(config, shard, num_blocks=BLOCKS, block_size=block_size, dtype=dtype, device=CPU)
    for layer in range(config.num_layers):
        for block in range(BLOCKS):
            kv.k[layer][block], kv.v[layer][block] = block + layer / 16, block + layer / 16 + 1 / 32
    return kv


def copies(kv: KVCache, kind: str) -> BlockCopies:
    if kind == "direct":
        return HostBlocks(kv, HOST)
    return StagedBlocks(kv, HOST, torch.empty(4 * 3 * kv.storage[:, :, 0].nbytes, dtype=torch.uint8))


def moves(out: list[tuple[int, int]], back: list[tuple[int, int]]) -> StepPlan:
    return StepPlan(0, b"", [], b"", b"", b"", b"", b"", pack(np.array(out).flatten()), pack(np.array(back).flatten()))


@pytest.mark.parametrize("kind", ["direct", "staged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_go_and_come_back_whole(checkpoint: Path, kind: str, dtype: torch.dtype) -> None:
    """More than a buffer holds, in stretches and single ones, out and in by one plan, and over what was there."""
    kv = cache(checkpoint, dtype)
    before = kv.storage.clone()
    moved = copies(kv, kind)
    moved.run(moves([(5, 0), (9, 1), (2, 2), (7, 4), (8, 3), (3, 9), (4, 10)], []))
    assert torch.equal(kv.storage, before)
    kv.storage[:, :, 5] = 99
    moved.run(moves([(6, 5), (1, 0)], [(2, 20), (3, 21), (1, 22), (10, 23), (4, 5), (5, 6), (0, 9)]))
    for block, source in {20: 2, 21: 8, 22: 9, 23: 4, 5: 7, 6: 6, 9: 1, 7: 7, 10: 10}.items():
        assert torch.equal(kv.storage[:, :, block], before[:, :, source]), f"block {block}"


def test_odd_sizes_are_copied_word_by_word(checkpoint: Path) -> None:
    """Pieces that are no multiple of eight bytes."""
    kv = cache(checkpoint, torch.bfloat16, block_size=1)
    kv.storage = kv.storage[..., :3].contiguous()
    moved = copies(kv, "staged")
    before = kv.storage.clone()
    moved.run(moves([(5, 3)], [(3, 6)]))
    assert torch.equal(kv.storage[:, :, 6], before[:, :, 5])


@pytest.mark.parametrize("kind", ["direct", "staged"])
@pytest.mark.parametrize(
    ("out", "back"),
    [
        ([(0, 1)], []),
        ([(BLOCKS, 1)], []),
        ([(1, HOST)], []),
        ([(1, -1)], []),
        ([], [(0, 0)]),
        ([], [(HOST, 1)]),
        ([(1, 1), (1, 2)], []),
        ([(1, 1), (2, 1)], []),
        ([], [(1, 3), (2, 3)]),
        ([], [(1, 3), (1, 4)]),
    ],
)
def test_copies_that_cannot_be_are_refused(
    checkpoint: Path, kind: str, out: list[tuple[int, int]], back: list[tuple[int, int]]
) -> None:
    kv = cache(checkpoint)
    before = kv.storage.clone()
    with pytest.raises(ProtocolError, match="copies of"):
        copies(kv, kind).run(moves(out, back))
    with pytest.raises(ProtocolError, match="pairs"):
        copies(kv, kind).run(StepPlan(0, b"", [], b"", b"", b"", b"", b"", pack([1, 2, 3])))
    assert torch.equal(kv.storage, before)


def test_what_moved_is_poison_where_it_was(checkpoint: Path) -> None:
    kv = cache(checkpoint)
    moved = HostBlocks(kv, HOST, poison=True)
    moved.run(moves([(3, 2)], []))
    assert kv.storage[:, :, 3].isnan().all() and kv.storage[:, :, 4].isfinite().all()
    moved.run(moves([], [(2, 5)]))
    assert math.isnan(moved.host[2].sum()) and kv.storage[0, 0, 5, 0, 0, 0] == 3


def test_stretches() -> None:
    assert list(runs(np.array([4, 5, 6, 9, 8, 2, 3]))) == [(0, 3), (3, 4), (4, 5), (5, 7)]
    assert list(runs(np.array([7]))) == [(0, 1)]


def test_sizes_of_host_memory(checkpoint: Path, tmp_path: Path) -> None:
    config = load_config(checkpoint)
    size = bytes_per_block(config, shard_for(config, 0, 1), 8, torch.float32)
    configure = configure_for(checkpoint, tmp_path, swap_bytes=10 * size + 1)
    assert host_blocks(configure, [size], 1 << 40) == 10
    assert host_blocks(configure, [size, 2 * size], 1 << 40) == 5  # the same on every rank
    assert host_blocks(configure_for(checkpoint, tmp_path, swap_blocks=3, swap_bytes=1), [size], 1 << 40) == 3
    assert host_blocks(configure_for(checkpoint, tmp_path), [size], 0) == 0
    with pytest.raises(DoesNotFit, match="one block takes"):
        host_blocks(configure_for(checkpoint, tmp_path, swap_bytes=9), [size], 1 << 40)
    with pytest.raises(DoesNotFit, match="lower swap_space"):
        host_blocks(configure, [size, size], 10 * size)
    assert reserve_staging(0, size, CPU) is None and staging_blocks(1 << 40, 7) == 1 and staging_blocks(1, 7) == 7


def test_copies_are_measured_and_without_host_memory_cost_nothing(checkpoint: Path) -> None:
    kv = cache(checkpoint)
    staging = reserve_staging(HOST, kv.storage[:, :, 0].nbytes, CPU)
    for made in (make_copies(kv, HOST, None, poison=False), make_copies(kv, HOST, staging, poison=False)):
        out, back = measure(made, BLOCKS)
        assert out > 0 and back > 0
    assert measure(make_copies(kv, 0, None, poison=False), BLOCKS) == (0.0, 0.0)


# ── the same tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


def requests() -> Requests:
    """Short and long ones, a third of which continue others, greedy and drawn."""
    random = np.random.default_rng(3)
    made: Requests = []
    for index in range(14):
        prompt = random.integers(0, 256, (10, 60, 25)[index % 3] + index).tolist()
        if index % 3 == 2:
            prompt = made[-1][1] + prompt[:15]
        params = SamplingParams(temperature=0.0 if index % 2 else 0.8, seed=index, max_tokens=40, ignore_eos=True)
        made.append((str(index), prompt, params))
    return made


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    with LocalGroup(checkpoint, tmp_path_factory.mktemp("shared")) as group:
        driver = Driver(group, prefix_cache=False, pipeline_depth=1)
        for request in requests():
            driver.submit(*request)
            driver.run()
        return {name: driver.tokens[name, 0] for name, _, _ in requests()}


def ways() -> Iterator[tuple[str, CostModel | None, int]]:
    """Preemption, what is known of costs, and host blocks that the core uses of those that there are."""
    yield "swap", None, 120
    yield "swap", None, 9
    yield "recompute", None, 120
    yield "auto", CostModel(LONG_ONLY), 120


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("emulate", ["", "rows"])
def test_no_token_changes(
    checkpoint: Path, undisturbed: dict[str, list[int]], tmp_path: Path, world_size: int, emulate: str
) -> None:
    """Forced, never and mixed, with poison where blocks were, at every depth; then a prompt from host memory."""
    kind = {"emulate": emulate} if emulate else {}
    with LocalGroup(checkpoint, tmp_path, world_size, swap_blocks=120, **kind) as group:
        for depth, (preemption, costs, blocks) in enumerate(ways()):
            driver = Driver(
                group,
                costs=costs,
                num_blocks=41,
                swap_blocks=blocks,
                preemption=preemption,
                pipeline_depth=1 + depth % 3,
            )
            for request in requests():
                driver.submit(*request)
            driver.run()
            stats = driver.core.stats()
            for name, tokens in undisturbed.items():
                assert driver.tokens[name, 0] == tokens, f"{name} {preemption=} {blocks=}"
            assert stats.preemptions >= 5, preemption
            swapped = stats.swapped_preemptions
            assert swapped == {"swap": stats.preemptions, "recompute": 0}.get(preemption, swapped)
            if preemption == "auto":
                assert 0 < swapped < stats.preemptions
            assert (stats.swapped_in_blocks > 0) == (preemption != "recompute")
        driver = Driver(group, num_blocks=41, preemption="swap")
        for request in requests():
            driver.submit(*request)
            driver.run()
        driver.submit("again", requests()[1][1], requests()[1][2])
        driver.run()
        assert driver.tokens["again", 0] == undisturbed["1"]
        assert driver.core.stats().preemptions == 0 and driver.core.stats().cpu_hit_tokens >= 56


def test_overlapped_steps_change_nothing(checkpoint: Path, undisturbed: dict[str, list[int]], tmp_path: Path) -> None:
    runner = Overlapped(configure_for(checkpoint, tmp_path, swap_blocks=60), "rows")
    for depth in (1, 2, 3):
        assert runner.run(requests(), depth, num_blocks=41, preemption="swap") == undisturbed
        assert runner.stats.swapped_in_blocks and runner.stats.preemptions


# ── the service ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def served(llm: LLM) -> list[list[int]]:
    streams = [llm.generate(prompt, params) for _, prompt, params in requests()]
    return [(await stream.final()).token_ids for stream in streams]


@pytest.mark.asyncio
async def test_a_service_swaps_and_its_host_memory_dies_with_its_engines(
    checkpoint: Path, undisturbed: dict[str, list[int]], tmp_path: Path
) -> None:
    """Two processes, one of them killed while blocks lie in host memory; the log of it all replays."""
    log = tmp_path / "events"
    async with LLM(
        str(checkpoint),
        tensor_parallel_size=2,
        dtype="float32",
        block_size=8,
        num_blocks=41,
        max_model_len=256,
        swap_space=0.02,
        preemption="swap",
        reserve_output="none",
        event_log=str(log),
        debug=True,
    ) as llm:
        assert await served(llm) == list(undisturbed.values())
        before = await llm.stats()
        assert before.swapped_in_blocks and before.swapped_preemptions and before.cpu_blocks_total > 100
        streams = [llm.generate(prompt, params) for _, prompt, params in requests()]
        await anext(streams[0])
        os.kill(llm.engine_pids[1], signal.SIGKILL)
        assert [(await stream.final()).token_ids for stream in streams] == list(undisturbed.values())
        after = await llm.stats()
        assert after.recoveries == 1 and after.swapped_in_blocks > before.swapped_in_blocks
        assert after.cpu_blocks_total == before.cpu_blocks_total and after.blocks_used == 0
    report = replay(log, check=True)
    assert report.good and report.steps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preemption": "sometimes"}, "auto, recompute, swap"),
        ({"preemption": "swap"}, "swap_space"),
        ({"swap_space": -1.0}, "swap_space"),
        ({"swap_space": 1e9}, "swap_space"),
        ({"swap_space": 1.0, "prefix_cache": False}, "prefix_cache"),
    ],
)
def test_options_that_make_no_sense_are_refused(checkpoint: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM(str(checkpoint), **options)  # type: ignore[arg-type]
