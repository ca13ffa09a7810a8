"""How many blocks fit."""

from __future__ import annotations

from treadle.errors import DoesNotFit

NULL_BLOCKS = 1
"""Block 0 takes memory and is never handed out."""


def block_bytes(*, layers: int, kv_heads: int, head_dim: int, block_size: int, itemsize: int) -> int:
    """Bytes of one block on one rank: keys and values of `block_size` tokens in every layer.

    kv_heads: of the rank's shard. itemsize: bytes of one number as it is stored.
    """
    return 2 * layers * kv_heads * head_dim * block_size * itemsize


def blocks_for_tokens(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens of one sequence."""
    return -(-tokens // block_size)


def blocks_in_budget(memory: int, bytes_per_block: int, *, block_size: int, min_tokens: int) -> int:
    """Blocks that fit in `memory` bytes, the null block included.

    Raises DoesNotFit when one sequence of `min_tokens` tokens would not fit; it says how many bytes are missing.
    """
    needed = blocks_for_tokens(min_tokens, block_size) + NULL_BLOCKS
    blocks = memory // bytes_per_block
    if blocks < needed:
        raise DoesNotFit(
            f"the KV cache has {memory} bytes, {needed * bytes_per_block - memory} too few: one sequence of "
            f"{min_tokens} tokens needs {needed} blocks of {bytes_per_block} bytes; give it more memory or "
            f"lower the context length to {max(0, blocks - NULL_BLOCKS) * block_size} tokens or less"
        )
    return blocks
