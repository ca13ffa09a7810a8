"""Blocks of key/value cache: pool, reference counts, prefix cache, sizing. No torch, no sockets, no clocks."""

from .block_pool import BlockId, BlockPool
from .invariant import CoreInvariantError
from .prefix_cache import Parent, PrefixCache
from .sizing import block_bytes, blocks_for_tokens, blocks_in_budget

__all__ = [
    "BlockId",
    "BlockPool",
    "CoreInvariantError",
    "Parent",
    "PrefixCache",
    "block_bytes",
    "blocks_for_tokens",
    "blocks_in_budget",
]
