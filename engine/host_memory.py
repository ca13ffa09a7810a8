"""How much host memory a rank keeps for blocks that leave the device, and what moves them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treadle.errors import DoesNotFit
from treadle.transport.messages import Configure

from .cuda.swap import StagedBlocks, staging_blocks
from .kv import KVCache
from .swap import BlockCopies, HostBlocks

_LANES = 4


def host_blocks(configure: Configure, sizes: Sequence[int], available: int) -> int:
    """Blocks of host memory, the same number on every rank. Raises DoesNotFit where it is more than there is.

    sizes: bytes of a block, by rank. available: bytes that the ranks, which share a machine, may take together.
    """
    blocks = configure.swap_blocks or configure.swap_bytes // max(sizes)
    if configure.swap_bytes and not blocks:
        raise DoesNotFit(f"swap_space of {configure.swap_bytes} bytes: one block takes {max(sizes)}")
    need = blocks * sum(sizes)
    if need > available:
        raise DoesNotFit(
            f"{blocks} blocks of host memory on {len(sizes)} ranks are {need / 1e9:,.1f} GB, and "
            f"{available / 1e9:,.1f} GB are available; lower swap_space or swap_blocks"
        )
    return blocks


def reserve_staging(host: int, block_bytes: int, device: torch.device) -> Tensor | None:
    """Memory of the device where blocks lie on their way, taken before the cache takes the rest; None for no host."""
    if not host:
        return None
    return torch.empty(_LANES * staging_blocks(block_bytes, host) * block_bytes, dtype=torch.uint8, device=device)


def make_copies(kv: KVCache, host: int, staging: Tensor | None, *, poison: bool) -> BlockCopies:
    """Of so many host blocks. staging: where blocks go through it. Raises DoesNotFit."""
    if staging is None:
        return HostBlocks(kv, host, poison=poison)
    try:
        return StagedBlocks(kv, host, staging)
    except (RuntimeError, MemoryError) as error:
        raise DoesNotFit(f"{host} blocks of pinned host memory: {error}; lower swap_space or swap_blocks") from error
