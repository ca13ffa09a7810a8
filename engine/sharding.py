"""Who computes what: the share of one rank in a tensor-parallel group. Pure arithmetic, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from treadle.errors import ConfigError

from .config import ModelConfig

# Matrix products like widths that fill their vectors and tiles.
_UNIT = 32


@dataclass(frozen=True, slots=True)
class Span:
    """The half-open range [start, stop)."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def scaled(self, factor: int) -> Span:
        return Span(self.start * factor, self.stop * factor)


@dataclass(frozen=True, slots=True)
class Shard:
    """What `rank` of `world_size` holds. q_heads and kv_heads count heads, intermediate columns, vocab token ids.

    Query heads, intermediate columns and the vocabulary are dealt out without overlap, in rank order. KV heads are
    too, unless there are more ranks than KV heads: then several ranks hold the same one (D11).
    """

    rank: int
    world_size: int
    q_heads: Span
    kv_heads: Span
    intermediate: Span
    vocab: Span


def shard_for(config: ModelConfig, rank: int, world_size: int) -> Shard:
    """Raises ConfigError when the model cannot be split that often; the message says how often it can."""
    most = max_world_size(config)
    if not 1 <= world_size <= most:
        raise ConfigError(f"tensor_parallel_size {world_size}: this model allows 1 to {most}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank}: allowed are 0 to {world_size - 1}")
    q_heads, kv_heads = _heads(config.num_heads, config.num_kv_heads, rank, world_size)
    return Shard(
        rank=rank,
        world_size=world_size,
        q_heads=q_heads,
        kv_heads=kv_heads,
        intermediate=split(config.intermediate_size, rank, world_size, unit=_UNIT),
        vocab=split(config.vocab_size, rank, world_size, unit=_UNIT),
    )


def max_world_size(config: ModelConfig) -> int:
    """One query head, one column and one token id for each rank is the least there can be."""
    return min(config.num_heads, config.intermediate_size, config.vocab_size)


def split(total: int, index: int, parts: int, unit: int = 1) -> Span:
    """Part `index` of `parts` of range(total), as even as whole units allow; larger parts first.

    The unit is halved until every part gets one. What is left over beside whole units goes to the last part.
    """
    while unit > 1 and total // unit < parts:
        unit //= 2
    units = total // unit
    each, extra = divmod(units, parts)
    start = index * each + min(index, extra)
    stop = start + each + (index < extra)
    return Span(start * unit, total if index == parts - 1 else stop * unit)


def _heads(num_heads: int, num_kv_heads: int, rank: int, world_size: int) -> tuple[Span, Span]:
    group = num_heads // num_kv_heads
    if world_size <= num_kv_heads:
        kv_heads = split(num_kv_heads, rank, world_size)
        return kv_heads.scaled(group), kv_heads
    # More ranks than KV heads: deal the ranks out to the KV heads, and the query heads of one among its ranks.
    for kv_head in range(num_kv_heads):
        ranks = split(world_size, kv_head, num_kv_heads)
        if rank < ranks.stop:
            part = split(group, rank - ranks.start, ranks.size)
            first = kv_head * group
            return Span(first + part.start, first + part.stop), Span(kv_head, kv_head + 1)
    raise ConfigError(f"rank {rank}: allowed are 0 to {world_size - 1}")
