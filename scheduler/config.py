"""What the core needs to know before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from treadle.errors import ConfigError

from .policies import check_policy_name

RESERVE_OUTPUT = ("estimate", "none", "full")
PREEMPTION = ("auto", "recompute", "swap")
MOST_WATERMARK = 0.5
MOST_TARGET_SECONDS = 3600.0
_EVICT_SHARE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """Sizes and limits of one scheduler core. Raises ConfigError when a value makes no sense.

    num_blocks, block_size: of the KV cache, the null block included; tokens per block.
    max_num_seqs: rows. max_num_batched_tokens: budget of one step. max_model_len: prompt and output together.
    vocab_size: token ids are in [0, vocab_size). pipeline_depth: plans in flight; 1 is synchronous.
    max_prefill_chunk: most tokens of one prompt in one step; None is what the budget leaves.
    max_waiting_requests, max_waiting_tokens: over these `add` raises Overloaded; a continuation counts as one. Under
    the first, requests for which a row is free do not count.
    max_tenant_requests, max_tenant_tokens: the same for each tenant, None is no bound of its own. Under the first,
    those do not count for whom a row is free, even if everybody else who waits gets one before.
    policy: one of `scheduler.policies.POLICIES`. target_tpot: seconds that a step with decodes may take (`pace.py`),
    None for most throughput. watermark: share of the blocks that admission leaves free while anything runs.
    reserve_output: what admission keeps for outputs to come: "estimate", "none" or "full" (`reservation.py`).
    max_engine_failures: a request in flight at that many engine deaths, with no token in between, fails. The first only
    makes it a suspect, and after the second it is tried alone: 3 is the least at which only who ran alone fails.
    swap_blocks: of host memory that hold what the device has given up (`swapping.py`), 0 is none. preemption: "auto",
    "recompute" or "swap". swap_out_seconds, swap_in_seconds: per block, as the ranks have measured.
    evict_ahead: when cached blocks have to go, at least so many go at once, which takes as long as one; None is a 256th
    of all, or 0 where they move to host memory, which is to be as late as can be.
    """

    num_blocks: int
    vocab_size: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 2048
    pipeline_depth: int = 2
    prefix_cache: bool = True
    max_prefill_chunk: int | None = None
    max_waiting_requests: int = 4096
    max_waiting_tokens: int = 8 << 20
    eos_token_ids: tuple[int, ...] = ()
    max_engine_failures: int = 3
    policy: str = "priority"
    max_tenant_requests: int | None = None
    max_tenant_tokens: int | None = None
    target_tpot: float | None = None
    watermark: float = 0.01
    reserve_output: str = "estimate"
    swap_blocks: int = 0
    preemption: str = "auto"
    swap_out_seconds: float = 0.0
    swap_in_seconds: float = 0.0
    evict_ahead: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_blocks", self.num_blocks, 2),
            ("vocab_size", self.vocab_size, 1),
            ("block_size", self.block_size, 1),
            ("max_num_seqs", self.max_num_seqs, 1),
            ("max_num_batched_tokens", self.max_num_batched_tokens, 1),
            ("max_model_len", self.max_model_len, 2),
            ("pipeline_depth", self.pipeline_depth, 1),
            ("max_waiting_requests", self.max_waiting_requests, 0),
            ("max_waiting_tokens", self.max_waiting_tokens, 1),
            ("max_engine_failures", self.max_engine_failures, 1),
            ("swap_blocks", self.swap_blocks, 0),
        ):
            if value < least:
                raise ConfigError(f"{name}={value}: it must be at least {least}")
        check_service_levels(self.policy, self.target_tpot, self.watermark, self.reserve_output)
        for name, bound in (
            ("max_tenant_requests", self.max_tenant_requests),
            ("max_tenant_tokens", self.max_tenant_tokens),
        ):
            if bound is not None and bound < 1:
                raise ConfigError(f"{name}={bound}: it must be at least 1, or None")
        check_swap(self.preemption, self.swap_blocks > 0, self.prefix_cache)
        for name, seconds in (("swap_out_seconds", self.swap_out_seconds), ("swap_in_seconds", self.swap_in_seconds)):
            if not 0 <= seconds < inf:
                raise ConfigError(f"{name}={seconds}: it must be a number of seconds from 0")
        if self.evict_ahead is not None and self.evict_ahead < 0:
            raise ConfigError(f"evict_ahead={self.evict_ahead}: it must be at least 0, or None")
        if self.max_prefill_chunk is not None and self.max_prefill_chunk < 1:
            raise ConfigError(f"max_prefill_chunk={self.max_prefill_chunk}: it must be at least 1, or None")
        if self.capacity < 2:
            raise ConfigError(f"num_blocks={self.num_blocks} with block_size=1: no sequence of two tokens fits")

    @property
    def capacity(self) -> int:
        """Longest sequence, prompt and output, that can ever run."""
        return min(self.max_model_len, (self.num_blocks - 1) * self.block_size)

    @property
    def evicted_at_once(self) -> int:
        """Cached blocks that go at least, when some have to."""
        if self.evict_ahead is not None:
            return self.evict_ahead
        return 0 if self.swap_blocks else self.num_blocks // _EVICT_SHARE

    @property
    def max_blocks_per_row(self) -> int:
        return -(-self.max_model_len // self.block_size)


def check_service_levels(policy: str, target_tpot: float | None, watermark: float, reserve_output: str) -> None:
    """Raises ConfigError that names what is wrong and what is allowed."""
    check_policy_name(policy)
    if target_tpot is not None and not 0 < target_tpot <= MOST_TARGET_SECONDS:
        raise ConfigError(
            f"target_tpot={target_tpot}: allowed are None and seconds above 0 and up to {MOST_TARGET_SECONDS:g}"
        )
    if not 0 <= watermark <= MOST_WATERMARK:
        raise ConfigError(f"watermark={watermark}: allowed is a share of the blocks from 0 to {MOST_WATERMARK:g}")
    if reserve_output not in RESERVE_OUTPUT:
        raise ConfigError(f"reserve_output={reserve_output!r}: allowed are {', '.join(RESERVE_OUTPUT)}")


def check_swap(preemption: str, tier: bool, prefix_cache: bool) -> None:
    """tier: whether there is host memory for blocks. Raises ConfigError that says what is allowed."""
    if preemption not in PREEMPTION:
        raise ConfigError(f"preemption={preemption!r}: allowed are {', '.join(PREEMPTION)}")
    if preemption == "swap" and not tier:
        raise ConfigError("preemption='swap' needs host memory to swap to: give swap_space (GiB) or swap_blocks")
    if tier and not prefix_cache:
        raise ConfigError("swap_space and swap_blocks need prefix_cache: swapped blocks are found again through it")
