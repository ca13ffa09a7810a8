"""Blocks of key/value cache: pool, reference counts, prefix cache, sizing. No torch, no sockets, no clocks."""

from .block_pool import BlockId, BlockPool, Blocks
from .host_tier import Copies, HostTier
from .invariant import CoreInvariantError
from .picture import picture
from .prefix_cache import NO_BLOCKS, Parent, PrefixCache
from .sizing import blocks_for_tokens

__all__ = [
    "NO_BLOCKS",
    "BlockId",
    "BlockPool",
    "Blocks",
    "Copies",
    "CoreInvariantError",
    "HostTier",
    "Parent",
    "PrefixCache",
    "blocks_for_tokens",
    "picture",
]
