"""How many KV blocks a GPU holds: what is left when the largest step has run once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from treadle.engine.batch import ForwardBatch
from treadle.engine.config import ModelConfig
from treadle.engine.kv import KVCache
from treadle.engine.sharding import Shard
from treadle.errors import DoesNotFit

from .program import StepProgram

# Captured graphs and modules that are loaded later; also what the allocator loses to fragments.
_RESERVE = 512 << 20
_GIB = float(1 << 30)


def weight_bytes(config: ModelConfig, shard: Shard, dtype: torch.dtype) -> int:
    """Of the matrices that a rank holds; vectors are left out."""
    q, kv = shard.q_heads.size * config.head_dim, shard.kv_heads.size * config.head_dim
    layer = config.hidden_size * (2 * q + 2 * kv + 3 * shard.intermediate.size)
    tables = (1 if config.tie_embeddings else 2) * shard.vocab.size * config.hidden_size
    return int((config.num_layers * layer + tables) * dtype.itemsize)


def check_weights(config: ModelConfig, shard: Shard, dtype: torch.dtype, device: torch.device, share: float) -> None:
    """Raises DoesNotFit before anything is read, where the weights alone are too large."""
    free, total = torch.cuda.mem_get_info(device)
    need, have = weight_bytes(config, shard, dtype), free - int(total * (1 - share))
    if need > have:
        raise DoesNotFit(
            f"the weights of a rank take {need / _GIB:.2f} GiB and GPU {device.index} has {have / _GIB:.2f} GiB for "
            f"us ({free / _GIB:.2f} GiB free, gpu_memory_utilization={share}): {(need - have) / _GIB:.2f} GiB are "
            "missing. More ranks (tensor_parallel_size) hold less each."
        )


@torch.inference_mode()
def largest_step(program: StepProgram, make_cache: Callable[[int], KVCache], max_tokens: int, max_len: int) -> None:
    """Runs a prefill of `max_tokens` with a sample for every row, in a cache of its own that holds nothing.

    All its tokens go to the null block, which nobody reads.
    """
    rows, device = program.rows, program.logits.device
    longest = min(max_tokens, max_len)
    query_starts = [*range(0, max_tokens, longest), max_tokens]
    counts = [stop - start for start, stop in pairwise(query_starts)]
    positions = torch.arange(max_tokens, device=device) % longest
    kept = program.kv
    program.kv = kv = kept or make_cache(2)
    batch = ForwardBatch(
        token_ids=torch.zeros(max_tokens, dtype=torch.int64, device=device),
        positions=positions,
        slots=positions % kv.block_size,
        query_starts=query_starts,
        context_lens=torch.tensor(counts, dtype=torch.int32, device=device),
        max_context=longest,
        block_tables=None,
        num_decode=0,
        sample_index=torch.arange(rows.max_rows, device=device) % max_tokens,
        rows=torch.full((len(counts),), rows.spare, dtype=torch.int32, device=device),
        table=rows.table,
        query_starts_device=torch.tensor(query_starts, dtype=torch.int32, device=device),
        max_query_len=longest,
        context_lens_host=counts,
    )
    program.model.logits_into(program.forward(batch), program.logits)
    if program.fused is not None:
        numbers = torch.full((rows.max_rows,), rows.spare, dtype=torch.int32, device=device)
        program.fused(program.logits, numbers, numbers.long(), True)
    # Penalties, lists and log-probabilities work on a copy in float32, and change another.
    wide = program.logits.float()
    wide.clone()
    program.kv = kept


def profile(small: Callable[[], None], large: Callable[[], None], device: torch.device) -> None:
    """Leaves what the largest step takes in the allocator's cache, so that no later step asks the driver for memory.

    small: a step that makes all that stays, which would else lie between what comes and goes. large: the largest step.
    """
    small()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    large()
    torch.cuda.synchronize(device)


def cache_bytes(device: torch.device, share: float, least: int) -> int:
    """What may become KV blocks after `profile`, at least `least`. Raises DoesNotFit."""
    free, total = torch.cuda.mem_get_info(device)
    activations = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    budget = int(free - total * (1 - share)) - _RESERVE
    if budget < least:
        raise DoesNotFit(
            f"the smallest KV cache takes {least / _GIB:.2f} GiB, and GPU {device.index} has {budget / _GIB:.2f} GiB "
            f"for it: {free / _GIB:.2f} of {total / _GIB:.2f} GiB are free beside the weights and the "
            f"{activations / _GIB:.2f} of a step, graphs take {_RESERVE / _GIB:.2f}, and "
            f"gpu_memory_utilization={share} leaves {total * (1 - share) / _GIB:.2f} untouched: "
            f"{(least - budget) / _GIB:.2f} GiB are missing. Raise gpu_memory_utilization, lower "
            "max_num_batched_tokens, max_num_seqs or max_model_len, or use more ranks."
        )
    return budget
