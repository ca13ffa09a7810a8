"""A decoder on one rank, driven by hand: rows with blocks of their own, prompts cut in every way.

Run as a program it is one rank of a gloo group: `python -m tests.enginekit DIRECTORY RANK WORLD_SIZE`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treadle.engine.batch import ForwardBatch
from treadle.engine.comm import Communicator, make_comm
from treadle.engine.config import load_config
from treadle.engine.kv import KVCache
from treadle.engine.model import Decoder, load_model
from treadle.engine.sharding import shard_for
from treadle.engine.weights import open_weights

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


def make_rig(path: Path, comm: Communicator, dtype: torch.dtype = torch.float32, **switches: Any) -> Rig:
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
    parts = [(first, tokens[first:stop]) for first, stop in itertools.pairwise(borders)]
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
RANK_WAYS = ("chunked", "among neighbours")


def run_rank(directory: Path, rank: int, world_size: int, native: bool) -> None:
    """What each rank of `test_ranks_add_up_to_the_model` does."""
    init_method = f"file://{directory}/rendezvous"
    comm = make_comm(rank, world_size, CPU, init_method=init_method, shared_dir=directory, native=native)
    for name, (path, tokens) in json.loads((directory / "work.json").read_text()).items():
        for way in RANK_WAYS:
            logits = WAYS[way](make_rig(Path(path), comm, native=native, pack=native), tokens)
            np.save(directory / f"{name}.{way}.{rank}.npy", logits.numpy())
    comm.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), native=False)
    torch.distributed.destroy_process_group()  # its threads, left to the end of the process, may abort it
