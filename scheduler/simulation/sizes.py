"""How large a simulation may be: what goes beyond is a slip of the hand, and would take all memory there is."""

from __future__ import annotations

from treadle.errors import ConfigError
from treadle.scheduler.config import CoreConfig

MOST_REPLICAS = 65_536
MOST_REQUESTS = 100_000_000
"""Some 50 bytes each, before the router."""
MOST_TOKENS = 1 << 24
"""Of one input or output: as long as the longest context of a service."""
MOST_PREFIXES = 1 << 30
MOST_SECONDS = 10**9
"""Of virtual time: thirty years, in which a float still tells microseconds apart."""
_MOST_BLOCKS = 1 << 26
"""Some 60 bytes each."""
TOO_LARGE = (MemoryError, OverflowError)
"""What allocating and computing raise for sizes that are allowed one by one and too large together."""


def check_sizes(config: CoreConfig) -> None:
    """Raises ConfigError for a core that no memory holds."""
    for name, value, most in (
        ("num_blocks", config.num_blocks, _MOST_BLOCKS),
        ("swap_blocks", config.swap_blocks, _MOST_BLOCKS),
        ("vocab_size", config.vocab_size, 1 << 24),
        ("block_size", config.block_size, 1 << 16),
        ("max_num_seqs", config.max_num_seqs, 65_536),
        ("max_num_batched_tokens", config.max_num_batched_tokens, 1 << 30),
        ("max_model_len", config.max_model_len, MOST_TOKENS),
    ):
        check_most(name, value, most)


def check_most(name: str, value: float, most: int) -> None:
    if value > most:
        raise ConfigError(f"{name}={value}: a simulation may have at most {most}")


def too_large(error: BaseException) -> ConfigError:
    """One line of what `TOO_LARGE` says."""
    return ConfigError(f"numbers that are too large together for a simulation: {str(error) or type(error).__name__}")
