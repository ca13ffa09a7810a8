"""The paged cache of keys and values that one rank holds."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .config import ModelConfig
from .sharding import Shard


def bytes_per_block(config: ModelConfig, shard: Shard, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes on this rank: keys and values of every layer."""
    elements = 2 * config.num_layers * shard.kv_heads.size * block_size * config.head_dim
    return elements * int(dtype.itemsize)


class KVCache:
    """k[layer], v[layer]: [num_blocks, kv_heads of this rank, block_size, head_dim].

    A head's part of a block is contiguous: attention reads it as one run. Block 0 is the null block: padding points
    there, and the scheduler never hands it out. Memory is committed as blocks are first written. They are views of
    storage: [layers, 2, num_blocks, …], contiguous.
    poison: start with NaN everywhere, so that a read of what was never written shows.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        poison: bool = False,
    ) -> None:
        shape = (config.num_layers, 2, num_blocks, shard.kv_heads.size, block_size, config.head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.dtype = dtype
        self.storage = storage = zeros(shape, dtype, device)
        if poison:
            storage.fill_(math.nan)
        self.k: list[Tensor] = [storage[layer, 0] for layer in range(config.num_layers)]
        self.v: list[Tensor] = [storage[layer, 1] for layer in range(config.num_layers)]


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On CPUs numpy's, which the kernel fills page by page when they are touched; torch would write them all now."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
