"""Between the scheduler and its engine ranks: how a rank becomes ready, steps and their results, the end.

A plan is a *delta*: a rank mirrors the rows, so tokens, sampling parameters and the block table of a request travel
once.
"""

from __future__ import annotations

from typing import NewType

import msgspec
from msgspec import field

from .base import Message
from .sampling import SamplingParams, TokenLogprobs

Row = NewType("Row", int)


class Hello(Message, frozen=True):
    """Rank → scheduler, first: who is there. `token` is the secret of this group, so no stray process joins it."""

    version: int
    rank: int
    pid: int
    token: str


class Configure(Message, frozen=True, kw_only=True):
    """Scheduler → rank, once: everything the rank needs to become ready.

    model: directory or GGUF file. dtype: "float32", "bfloat16", "float16". num_blocks 0: take the size from
    `kv_cache_bytes` (0: from what is free). init_method: torch.distributed's, shared by the group.
    collective_timeout: seconds that a rank waits for its peers, in loading and in a step.
    swap_blocks: of host memory; 0: as many as fit into `swap_bytes`, of this rank; 0 again is none.
    On "cuda" only: cuda_graphs: replay decode steps from graphs. overlap: begin a step before the last one's tokens are
    there. gpu_memory_utilization: share of the device's memory that may be taken in all. attention_backend: "auto",
    "triton", "flashinfer", "torch". fused_linears: products of few rows through kernels that take the norm before them
    and the activation or the sum after them along. fused_sums: small sums over the ranks in one launch with the norm.
    overlap_sums: one half of a large step's tokens is summed while the other half is computed. mask_slots: steps whose
    masks have room in shared memory, for `max_num_seqs` rows each; 0: they are sent. mask_words: of one mask there.
    """

    model: str
    random_weights: bool
    seed: int
    world_size: int
    device: str
    dtype: str
    kv_dtype: str
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    init_method: str
    threads: int
    native: bool
    shared_dir: str
    collective_timeout: float = 60.0
    debug: bool = False
    cuda_graphs: bool = True
    overlap: bool = True
    gpu_memory_utilization: float = 0.9
    attention_backend: str = "auto"
    fused_linears: bool = True
    fused_sums: bool = True
    overlap_sums: bool = True
    swap_blocks: int = 0
    swap_bytes: int = 0
    mask_slots: int = 0
    mask_words: int = 0


class Loading(Message, frozen=True):
    """Rank → scheduler, some times a second while weights are read: bytes as the model will hold them, of this rank."""

    rank: int
    done: int
    total: int


class Ready(Message, frozen=True, kw_only=True):
    """Rank → scheduler: loaded. `fingerprint` is equal on all ranks of a group or they hold different models.

    phases: where the time since the process began went, in seconds; what ran beside it has names that begin with "+".
    swap_blocks: of host memory. swap_out_seconds, swap_in_seconds: that a block takes to go there and back, measured.
    slow: why it computes more slowly than it could; empty where it does not.
    """

    rank: int
    fingerprint: str
    num_blocks: int
    load_seconds: float
    weight_bytes: int
    kv_bytes: int
    backend: str
    phases: dict[str, float] = field(default_factory=dict)
    swap_blocks: int = 0
    swap_out_seconds: float = 0.0
    swap_in_seconds: float = 0.0
    slow: str = ""


class RowStart(Message, frozen=True):
    """A request gets a row: all that the ranks will ever need of it.

    tokens: prompt and, after a preemption or a recovery, the committed output. prompt_len: how many are the prompt.
    computed: leading tokens whose K/V already lies in `blocks` (a prefix hit). seed: unsigned 64 bit, resolved.
    stop_ids: banned until `min_tokens` output tokens exist.
    """

    row: int
    prompt_len: int
    computed: int
    tokens: bytes
    blocks: bytes
    params: SamplingParams
    seed: int
    stop_ids: bytes


class StepPlan(Message, frozen=True):
    """One step, applied in this order: release rows, start rows, append blocks, copy blocks out, copy blocks in, run.

    release: rows that end. grow_rows/grow_blocks: pairs; the block is appended to the row's table. rows/counts: pairs;
    the row computes its next `count` tokens, and samples when that reaches the last token it knows (the rank's own
    mirror tells), in the order given here. guided: rows among those that sample whose token must wait for this step's
    `Masks`; empty in nearly all plans, and then no such message comes.
    copy_out: pairs (device block, host block), copy_in: pairs (host block, device block); host blocks count from 0. All
    of the first come before all of the second, and no block is written twice. A block may be read by one copy and
    written by a later one of the same plan, and by the step.
    """

    step: int
    release: bytes
    start: list[RowStart]
    grow_rows: bytes
    grow_blocks: bytes
    rows: bytes
    counts: bytes
    guided: bytes = b""
    copy_out: bytes = b""
    copy_in: bytes = b""


class Masks(Message, frozen=True):
    """Scheduler → rank: which tokens the guided rows of a step may sample. It may come before or after the step's plan.

    rows: one number for each of the plan's guided rows, in its order: which mask below is its own, -1 where everything
    is allowed. A mask is uint32, ceil(vocab / 32) words; the lowest bit of the first is token 0. kinds: one for each
    mask: `masks.ONLY` has zeros but for the words that are given, `masks.EXCEPT` ones but for these, `masks.BITS` is
    given whole. counts: how many words are given (0 for BITS). places: int32, which words they are, of all masks one
    after the other, ascending within each. words: uint32, the words themselves. bits: uint32, of all BITS masks one
    after the other. shared: there is one mask for each of the rows, in the memory that these processes share
    (`mask_pages`), and nothing here but `rows`.
    """

    step: int
    rows: bytes
    kinds: bytes
    counts: bytes
    places: bytes
    words: bytes
    bits: bytes
    shared: bool = False


class RowFault(msgspec.Struct, array_like=True, frozen=True):
    """One row's work failed alone (a bad bias, say); the others of the step are good. code: of the error (`errors`)."""

    row: int
    message: str
    code: str = "request_failed"


class StepResult(Message, frozen=True):
    """Rank → scheduler. tokens: one per row that sampled, in plan order; only rank 0 fills it and `logprobs`.

    digest: running CRC-32 over every plan's bytes, every mask's and every sampled token so far (`codec.Digest`): a rank
    that applied another plan or sampled another token is found in the same step.
    elapsed_us: time in the step; began_us: when it began, by the machine's monotonic clock. forward_us, sample_us: its
    parts. Where a device runs them as one, all of it is forward_us.
    """

    step: int
    rank: int
    digest: int
    tokens: bytes
    elapsed_us: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)
    began_us: int = 0
    forward_us: int = 0
    sample_us: int = 0


class Failure(Message, frozen=True):
    """Rank → scheduler, last words. code: of `treadle.errors`. step: -1 before the first."""

    rank: int
    step: int
    code: str
    message: str
    details: str


class Shutdown(Message, frozen=True):
    """Scheduler → rank: finish the step in hand, free everything, exit 0."""
