"""Blocks of key/value cache: pool, reference counts, prefix cache, sizing. No torch, no sockets, no clocks."""

from .block_pool import BlockId, BlockPool
from .invariant import CoreInvariantError
from .picture import picture
from .prefix_cache import Parent, PrefixCache
from .sizing import blocks_for_tokens

__all__ = [
    "BlockId",
    "BlockPool",
    "CoreInvariantError",
    "Parent",
    "PrefixCache",
    "blocks_for_tokens",
    "picture",
]
