"""How many blocks tokens take."""

from __future__ import annotations

NULL_BLOCKS = 1
"""Block 0 takes memory and is never handed out."""


def blocks_for_tokens(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens of one sequence."""
    return -(-tokens // block_size)
