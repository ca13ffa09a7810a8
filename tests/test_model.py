"""The decoder against transformers: every family, every way to cut a prompt, every number of ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.modelkit import FAMILIES, load_reference, make_checkpoint
from treadle.engine.batch import ForwardBatch
from treadle.engine.comm import Communicator, SingleComm, make_comm
from treadle.engine.config import load_config
from treadle.engine.kv import KVCache
from treadle.engine.model import Decoder, load_model
from treadle.engine.native import load_native
from treadle.engine.sharding import shard_for
from treadle.engine.weights import open_weights
from treadle.errors import ConfigError

BLOCK = 16
PAGES = 8
CPU = torch.device("cpu")


@dataclass
class Rig:
    """A decoder with a cache of its own, fed row by row; row r owns blocks 1 + r * PAGES onwards, in reverse order."""

    model: Decoder
    kv: KVCache

    def step(self, rows: list[tuple[int, int, list[int]]], sample: list[int] | None = None) -> Tensor:
        """rows: (row, position of the first token, tokens), rows with one token first. Logits [S, vocab_local]."""
        tables = [[1 + row * PAGES + page for page in reversed(range(PAGES))] for row, _, _ in rows]
        tokens, positions, slots, starts = [], [], [], [0]
        for table, (_, first, some) in zip(tables, rows, strict=True):
            for position in range(first, first + len(some)):
                positions.append(position)
                slots.append(table[position // BLOCK] * BLOCK + position % BLOCK)
            tokens += some
            starts.append(len(tokens))
        contexts = [first + len(some) for _, first, some in rows]
        picked = [stop - 1 for stop in starts[1:]] if sample is None else sample
        batch = ForwardBatch(
            token_ids=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            query_starts=starts,
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            max_context=max(contexts),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            num_decode=sum(len(some) == 1 for _, _, some in rows),
            sample_index=torch.tensor(picked, dtype=torch.int64),
        )
        with torch.inference_mode():
            hidden = self.model.forward(batch, self.kv)
            return self.model.logits(hidden) if picked else hidden


def make_rig(path: Path, comm: Communicator, dtype: torch.dtype = torch.float32, **switches: bool) -> Rig:
    config = load_config(path)
    model = load_model(config, open_weights(path, config), comm, device=CPU, dtype=dtype, **switches)
    shard = shard_for(config, comm.rank, comm.world_size)
    kv = KVCache(config, shard, num_blocks=1 + 4 * PAGES, block_size=BLOCK, dtype=dtype, device=CPU, poison=True)
    return Rig(model, kv)


def tokens_of(row: int, count: int) -> list[int]:
    return np.random.default_rng(row).integers(0, 256, count).tolist()


def whole(rig: Rig, tokens: list[int]) -> Tensor:
    return rig.step([(0, 0, tokens)], sample=list(range(len(tokens))))


def chunked(rig: Rig, tokens: list[int]) -> Tensor:
    """Chunks of uneven size, that start and end inside pages, a single token among them."""
    borders = [0, 7, 8, 39, len(tokens)]
    parts = [(first, tokens[first:stop]) for first, stop in zip(borders, borders[1:], strict=False)]
    return torch.cat([rig.step([(0, first, part)], sample=list(range(len(part)))) for first, part in parts])


def one_by_one(rig: Rig, tokens: list[int]) -> Tensor:
    return torch.cat([rig.step([(0, position, [token])]) for position, token in enumerate(tokens)])


def among_neighbours(rig: Rig, tokens: list[int]) -> Tensor:
    """Half as a prompt, the rest token by token, while other rows decode and prefill in the same steps."""
    half = len(tokens) // 2
    rig.step([(1, 0, tokens_of(1, 20)), (2, 0, tokens_of(2, 33))])
    parts = [rig.step([(1, 20, [3]), (0, 0, tokens[:half])], sample=list(range(1, half + 1)))]
    for position in range(half, len(tokens)):
        logits = rig.step([(2, position, [5]), (0, position, [tokens[position]]), (3, 0, tokens_of(3, 9))])
        parts.append(logits[1:2])
    return torch.cat(parts)


WAYS: dict[str, Callable[[Rig, list[int]], Tensor]] = {
    "whole": whole,
    "chunked": chunked,
    "one by one": one_by_one,
    "among neighbours": among_neighbours,
}


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


@pytest.fixture(scope="module", params=list(VARIANTS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    family, options = VARIANTS[request.param]
    path = make_checkpoint(tmp_path_factory.mktemp("model"), family, **options)  # type: ignore[arg-type]
    tokens = tokens_of(0, 75)
    with torch.inference_mode():
        expected = load_reference(path)(torch.tensor([tokens])).logits[0]
    yield Checkpoint(path, tokens, expected)


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


@pytest.mark.parametrize(("world_size", "native"), [(2, True), (3, True), (5, True), (2, False)])
def test_ranks_add_up_to_the_model(checkpoint: Checkpoint, tmp_path: Path, world_size: int, native: bool) -> None:
    if native and load_native() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "tokens.json").write_text(json.dumps(checkpoint.tokens))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.test_model", str(checkpoint.path), str(tmp_path), str(rank), str(world_size)]
            + (["native"] if native else []),
        )
        for rank in range(world_size)
    ]
    assert [rank.wait(120) for rank in ranks] == [0] * world_size
    for way in WAYS:
        parts = [np.load(tmp_path / f"{way}.{rank}.npy") for rank in range(world_size)]
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


def run_rank(path: Path, directory: Path, rank: int, world_size: int, native: bool) -> None:
    torch.set_num_threads(1)
    init_method = f"file://{directory}/rendezvous"
    comm = make_comm(rank, world_size, CPU, init_method=init_method, shared_dir=directory, native=native)
    tokens = json.loads((directory / "tokens.json").read_text())
    for way, run in WAYS.items():
        logits = run(make_rig(path, comm, native=native, pack=native), tokens)
        np.save(directory / f"{way}.{rank}.npy", logits.numpy())
    comm.barrier()


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:] == ["native"])
