"""What a service says of itself: what it serves, what it has counted, and how it is."""

from __future__ import annotations

import msgspec
from msgspec import field

from .base import Message


class ServerInfo(Message, frozen=True, kw_only=True):
    id: str
    version: int
    incarnation: str
    model: str
    max_model_len: int
    vocab_size: int
    world_size: int


class TokenizerInfo(Message, frozen=True, kw_only=True):
    """What a client needs to make tokens of text and text of tokens, with no model file."""

    id: str
    tokenizer_json: bytes
    chat_template: str
    bos_token: str
    eos_token: str
    add_bos: bool
    eos_token_ids: list[int]


class Stats(Message, frozen=True, kw_only=True):
    """Counters since start, and the present. Times in seconds, sizes in tokens or blocks.

    policy_errors: wrong answers of the scheduling policy. recomputed_tokens: K/V that was there before a preemption.
    swapped_preemptions: whose blocks were kept for host memory. cpu_blocks_total, cpu_blocks_used: of host memory.
    cpu_hit_tokens: prompt tokens served from there, which cached_prompt_tokens counts, too. swapped_out_blocks,
    swapped_in_blocks: copied. cpu_evictions: blocks of host memory given up for others.
    """

    id: str = ""
    step: int = 0
    running: int = 0
    waiting: int = 0
    finished: int = 0
    preemptions: int = 0
    recoveries: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    evictions: int = 0
    bad_frames: int = 0
    policy_errors: int = 0
    recomputed_tokens: int = 0
    swapped_preemptions: int = 0
    cpu_blocks_total: int = 0
    cpu_blocks_used: int = 0
    cpu_hit_tokens: int = 0
    swapped_out_blocks: int = 0
    swapped_in_blocks: int = 0
    cpu_evictions: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were served from the prefix cache."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """Share of blocks owned by running requests."""
        return self.blocks_used / self.blocks_total if self.blocks_total else 0.0

    @property
    def cpu_occupancy(self) -> float:
        """Share of the blocks of host memory that hold something."""
        return self.cpu_blocks_used / self.cpu_blocks_total if self.cpu_blocks_total else 0.0


class HistogramFigures(msgspec.Struct, array_like=True, frozen=True):
    """Counts since start. bounds: upper ends of the buckets, inclusive; `counts` has one more, for the rest.

    phase: of a step, "" for what has no parts. total: of all values.
    """

    name: str
    phase: str
    bounds: list[float]
    counts: list[int]
    total: float


class TenantFigures(msgspec.Struct, array_like=True, frozen=True):
    """Of one tenant: continuations now, and counters since start."""

    name: str
    running: int
    waiting: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    finished: int
    refused: int


class ServiceMetrics(Message, frozen=True, kw_only=True):
    """What is counted beside `Stats`, for whoever draws it. docs/http.md says what the names mean.

    refused: requests by reason. losses: engine groups by cause. traces: traced requests by what became of them.
    """

    id: str = ""
    histograms: list[HistogramFigures] = field(default_factory=list)
    tenants: list[TenantFigures] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    traces: dict[str, int] = field(default_factory=dict)


class Health(Message, frozen=True, kw_only=True):
    """Judged by progress, not by liveness.

    state: "starting"; "ready"; "stuck", when a step has used up half of its time; "degraded", while a lost engine group
    is replaced and streams pause; "draining", when nothing new is taken; "failed"; "closed".
    step: steps finished. step_age: seconds that the oldest step in flight has been running, 0 when idle.
    Of who is stuck or was lost: rank (-1: nobody knows), at_step (-1: between steps), doing, cause, seconds since.
    progress, attempt: of the replacement. spare: "" where none is kept, "ready", "loading", "lost".
    """

    id: str = ""
    state: str
    detail: str = ""
    step: int = 0
    step_age: float = 0.0
    rank: int = -1
    at_step: int = -1
    doing: str = ""
    cause: str = ""
    seconds: float = 0.0
    progress: str = ""
    attempt: int = 0
    spare: str = ""
