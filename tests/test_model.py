"""The decoder against transformers: every family, every way to cut a prompt, every number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.enginekit import RANK_WAYS, WAYS, make_rig, one_by_one, run_rank, tokens_of, whole
from tests.modelkit import FAMILIES, load_reference, make_checkpoint
from treadle.engine.comm import SingleComm
from treadle.engine.native import load_native
from treadle.errors import ConfigError


@dataclass
class Checkpoint:
    path: Path
    tokens: list[int]
    expected: Tensor


VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama3 tied": ("llama3", {"tied": True}),
    "llama3 biases": ("llama3", {"attention_bias": True, "mlp_bias": True}),
    "mistral window": ("mistral", {"sliding_window": 24}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a rank has; the tensors are tiny, and threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    made = {}
    for name, (family, options) in VARIANTS.items():
        path = make_checkpoint(tmp_path_factory.mktemp("model"), family, **options)  # type: ignore[arg-type]
        tokens = tokens_of(0, 75)
        with torch.inference_mode():
            expected = load_reference(path)(torch.tensor([tokens])).logits[0]
        made[name] = Checkpoint(path, tokens, expected)
    return made


@pytest.fixture(params=list(VARIANTS))
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


def check(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= tolerance * expected.abs().max().item()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("native", [True, False])
def test_logits_are_those_of_transformers(checkpoint: Checkpoint, way: str, native: bool) -> None:
    if native and load_native() is None:
        pytest.skip("no C compiler here")
    rig = make_rig(checkpoint.path, SingleComm(), native=native, pack=native)
    assert rig.model.backend_name.startswith("native" if native else "torch")
    check(WAYS[way](rig, checkpoint.tokens), checkpoint.expected)


@pytest.mark.parametrize(("world_size", "native"), [(2, True), (3, True), (4, True), (2, False)])
def test_ranks_add_up_to_the_model(
    checkpoints: dict[str, Checkpoint], tmp_path: Path, world_size: int, native: bool
) -> None:
    if native and load_native() is None:
        pytest.skip("no C compiler here")
    work = {name: [str(checkpoint.path), checkpoint.tokens] for name, checkpoint in checkpoints.items()}
    (tmp_path / "work.json").write_text(json.dumps(work))
    if native:  # threads will do, and need not import torch again
        with ThreadPoolExecutor(world_size) as pool:
            list(pool.map(lambda rank: run_rank(tmp_path, rank, world_size, native), range(world_size)))
    else:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.enginekit", str(tmp_path), str(rank), str(world_size)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            for rank in range(world_size)
        ]
        assert [rank.wait(120) for rank in ranks] == [0] * world_size
    for name, checkpoint in checkpoints.items():
        for way in RANK_WAYS:
            parts = [np.load(tmp_path / f"{name}.{way}.{rank}.npy") for rank in range(world_size)]
            check(torch.from_numpy(np.concatenate(parts, axis=1)), checkpoint.expected)


def test_bfloat16_stays_near(checkpoint: Checkpoint) -> None:
    """Not exact: the check is that the native kernels err no more than the torch ones do."""
    found = {}
    for native in (True, False):
        rig = make_rig(checkpoint.path, SingleComm(), torch.bfloat16, native=native, pack=native)
        found[native] = torch.cat((whole(rig, checkpoint.tokens), one_by_one(rig, checkpoint.tokens)))
    expected = torch.cat((checkpoint.expected, checkpoint.expected))
    errors = {native: (logits - expected).pow(2).mean().sqrt().item() for native, logits in found.items()}
    assert errors[True] <= 1.2 * errors[False]
    assert errors[True] <= 0.05 * expected.abs().max().item()


def test_a_step_without_samples_still_fills_the_cache(checkpoint: Checkpoint) -> None:
    rig = make_rig(checkpoint.path, SingleComm())
    assert rig.step([(0, 0, checkpoint.tokens[:50])], sample=[]).shape[0] == 0
    check(rig.step([(0, 50, checkpoint.tokens[50:])]), checkpoint.expected[-1:])


def test_a_cache_of_another_type_is_refused(checkpoint: Checkpoint) -> None:
    rig = make_rig(checkpoint.path, SingleComm())
    rig.kv = make_rig(checkpoint.path, SingleComm(), torch.bfloat16).kv
    with pytest.raises(ConfigError, match="bfloat16"):
        rig.step([(0, 0, [1])])
