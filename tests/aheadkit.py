"""Which kernels steps launch, and whether `compile_ahead` knows them: a program, as Triton has one driver for all.

`python -m tests.aheadkit MODEL WORLD_SIZE` prints those that it does not know.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from treadle.engine.config import load_config
from treadle.engine.cuda.build import make_program
from treadle.engine.cuda.compile_ahead import noted, wanted
from treadle.engine.cuda.graphs import ladder
from treadle.engine.cuda.memory import largest_step
from treadle.engine.cuda.warm import Echo
from treadle.engine.kv import KVCache
from treadle.engine.model import load_model
from treadle.engine.sharding import shard_for
from treadle.engine.weights import open_weights
from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, SamplingParams

from .groupkit import configure_for

HOPPER = 90
CPU = torch.device("cpu")
MOST_TOKENS, LONGEST = 256, 128


@torch.inference_mode()
def main(model_path: Path, world_size: int) -> None:
    shape = {"max_num_seqs": 24, "max_num_batched_tokens": MOST_TOKENS, "max_model_len": LONGEST}
    configure = configure_for(model_path, model_path, world_size, dtype="bfloat16", block_size=16, **shape)
    known = wanted(configure, HOPPER)
    config, comm = load_config(model_path), Echo(world_size)
    model = load_model(
        config, open_weights(model_path, config), comm,
        device=CPU, dtype=torch.bfloat16, native=False, triton=True, max_rows=24, max_positions=LONGEST,
    )  # fmt: skip
    program = make_program(configure, model, comm, dtype=torch.bfloat16, device=CPU, kernels=True)
    shard = shard_for(config, 0, world_size)
    program.kv = KVCache(config, shard, num_blocks=64, block_size=16, dtype=torch.bfloat16, device=CPU)
    with noted() as launched:
        program.rows.start([RowStart(0, 3, 0, pack([1, 2, 3]), pack([1]), SamplingParams(), 7, b"")])
        for size in ladder(24):
            program.decode(size, LONGEST)
            for filtered in (False, True):
                program.sample(size, filtered)
        for tokens in (2, 9, 60, MOST_TOKENS):
            largest_step(program, lambda blocks: program.kv, tokens, LONGEST)  # type: ignore[arg-type, return-value]
    names = {name for name, _ in launched}
    assert len(launched) > 15 and {"_vector_kernel", "_matrix_kernel"} <= names, sorted(launched)
    for name, data in sorted(set(launched) - set(known)):
        print(name, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
