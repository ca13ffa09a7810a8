"""Swapping on a GPU: copies beside the steps and between CUDA graphs change no token. `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from treadle.engine.config import load_config
from treadle.engine.host_memory import make_copies, reserve_staging
from treadle.engine.kv import KVCache
from treadle.engine.sharding import shard_for

from .modelkit import make_checkpoint
from .test_gpu_runner import on_gpu, requests

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama3"), "llama3")


@pytest.mark.parametrize("graphs", [True, False])
def test_swapping_changes_no_token(checkpoint: Path, tmp_path: Path, graphs: bool) -> None:
    """In float32, at every depth, with host memory that is ample or hardly any; and no step asks the driver for memory
    once all ways have been gone."""
    runner = on_gpu(checkpoint, tmp_path, cuda_graphs=graphs, swap_blocks=200)
    assert runner.ready.swap_blocks == 200 and runner.ready.swap_in_seconds > 0
    expected = runner.run(requests("mixed"), 1)
    before = 0
    for _ in range(2):
        before = torch.cuda.memory_stats()["num_device_alloc"]
        for depth in (1, 2):
            for swap_blocks in (200, 9):
                found = runner.run(requests("mixed"), depth, num_blocks=25, swap_blocks=swap_blocks, preemption="swap")
                assert found == expected, f"{depth=} {swap_blocks=}"
                assert runner.stats.swapped_in_blocks and runner.stats.swapped_preemptions
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_wait_for_each_other(checkpoint: Path, dtype: torch.dtype) -> None:
    """Thousands of copies in random order against a plain model of both memories, while the device is kept busy."""
    config, device = load_config(checkpoint), torch.device("cuda")
    shard = shard_for(config, 0, 1)
    blocks, host = 40, 30
    kv = KVCache(config, shard, num_blocks=blocks, block_size=16, dtype=dtype, device=device)
    size = kv.storage[:, :, 0].numel() * dtype.itemsize
    staging = reserve_staging(3, size, device)  # buffers of three blocks: most plans need several
    copies = make_copies(kv, host, staging, poison=False)
    kv.storage.copy_(torch.randn_like(kv.storage))
    device_model = [kv.storage[:, :, block].clone() for block in range(blocks)]
    host_model: list[torch.Tensor | None] = [None] * host
    random = np.random.default_rng(0)
    heavy = torch.randn(2048, 2048, device=device)
    for step in range(150):
        heavy = (heavy @ heavy).clamp(-1, 1)
        count = int(random.integers(1, 12))
        sources = random.permutation(np.arange(1, blocks))[:count].astype(np.int32)
        places = random.permutation(host)[:count].astype(np.int32)
        copies.copy_out(np.stack((sources, places), 1))
        for block, place in zip(sources.tolist(), places.tolist(), strict=True):
            host_model[place] = device_model[block]
        kv.storage[:, :, int(sources[0])] = float(step)  # the step that gets the block writes at once
        device_model[int(sources[0])] = torch.full_like(device_model[0], float(step))
        filled = [place for place, content in enumerate(host_model) if content is not None]
        chosen = random.permutation(np.array(filled, np.int32))[:count]
        targets = random.permutation(np.arange(1, blocks))[: len(chosen)].astype(np.int32)
        copies.copy_in(np.stack((chosen, targets), 1))
        for place, block in zip(chosen.tolist(), targets.tolist(), strict=True):
            content = host_model[place]
            assert content is not None
            device_model[block] = content
    copies.wait()
    for block in range(1, blocks):
        assert torch.equal(kv.storage[:, :, block], device_model[block]), f"block {block}"
