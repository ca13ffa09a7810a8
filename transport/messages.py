"""The vocabulary: every struct that crosses a boundary.

Two conversations use it. The scheduler and its engine ranks exchange `Hello`, `Configure`, `Loading`, `Ready`,
`StepPlan`, `Masks`, `StepResult`, `Failure`, `Shutdown`. Clients and the service exchange `Submit`, `Abort`, `Delta`,
`Refused` and the information requests. All structs are tagged msgspec arrays, decoded with types (see `codec.py`);
nothing is pickled.

Numbers that come in arrays travel as raw little-endian bytes: `int32` unless the field says otherwise. A plan is a
*delta*: a rank mirrors the rows, so tokens, sampling parameters and the block table of a request travel once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NewType

import msgspec

from treadle.errors import InvalidParameter

PROTOCOL_VERSION = 4

Row = NewType("Row", int)


class Guided(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the output must be; exactly one field is given. Field names are those of vLLM's `StructuredOutputsParams`.

    json: a JSON schema, as a dict or as text; kept and sent as text. json_object: any JSON object. regex: the whole
    output matches it (Rust's syntax, no look-around or back-references). choice: the output is one of these texts.
    grammar: in the Lark dialect of llguidance, with a rule `start`.

    Raises InvalidParameter for a dict that JSON cannot say; the rest is checked by `transport.params`.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.json, dict):
            msgspec.structs.force_setattr(self, "json", _json_text(self.json))

    @property
    def source(self) -> tuple[str, str]:
        """(kind, text): which field was given, and its value as text."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.choice is not None:
            return "choice", _json_text(self.choice)
        for kind, text in (("json", self.json), ("regex", self.regex), ("grammar", self.grammar)):
            if text is not None:
                return kind, str(text)
        return "", ""


def _json_text(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidParameter(f"guided: {type(value).__name__} cannot be written as JSON: {error}") from error


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose the next tokens. Field names and meanings are those of vLLM's `SamplingParams`.

    Values are checked by `treadle.transport.params.check_params`, which says what is allowed.

    n: continuations of the same prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. top_p, min_p: in [0, 1].
    repetition_penalty: over prompt and output, 1 is none. presence_penalty, frequency_penalty: over the output, 0 none.
    seed: None draws one; the same seed gives the same tokens whatever else runs. max_tokens: None is up to the context
    limit. stop: strings that end the text. logprobs, prompt_logprobs: how many of the top log-probabilities to return
    beside the chosen token's; None is none. logit_bias: token id to an addend. allowed_token_ids, banned_token_ids:
    restrict the vocabulary. guided: holds the output to a schema, an expression or a grammar; None is free.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] | str = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    guided: Guided | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True, forbid_unknown_fields=True, gc=False):
    """Base of everything that is sent as a frame. It holds data and never refers back to itself: nothing for the gc."""


# ── scheduler ↔ engine ranks ─────────────────────────────────────────────────────────────────────────────────────────


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
    On "cuda" only: cuda_graphs: replay decode steps from graphs. overlap: begin a step before the last one's tokens are
    there. gpu_memory_utilization: share of the device's memory that may be taken in all. attention_backend: "auto",
    "triton", "flashinfer", "torch". fused_linears: products of few rows through kernels that take the norm before them
    and the activation or the sum after them along. fused_sums: small sums over the ranks in one launch with the norm.
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


class Loading(Message, frozen=True):
    """Rank → scheduler, some times a second while weights are read: bytes as the model will hold them, of this rank."""

    rank: int
    done: int
    total: int


class Ready(Message, frozen=True, kw_only=True):
    """Rank → scheduler: loaded. `fingerprint` is equal on all ranks of a group or they hold different models.

    phases: where the time since the process began went, in seconds; what ran beside it has names that begin with "+".
    """

    rank: int
    fingerprint: str
    num_blocks: int
    load_seconds: float
    weight_bytes: int
    kv_bytes: int
    backend: str
    phases: dict[str, float] = {}


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
    """One step, applied in the order of the fields: release rows, start rows, append blocks, run.

    release: rows that end. grow_rows/grow_blocks: pairs; the block is appended to the row's table. rows/counts: pairs;
    the row computes its next `count` tokens, and samples when that reaches the last token it knows (the rank's own
    mirror tells), in the order given here. guided: rows among those that sample whose token must wait for this step's
    `Masks`; empty in nearly all plans, and then no such message comes.
    """

    step: int
    release: bytes
    start: list[RowStart]
    grow_rows: bytes
    grow_blocks: bytes
    rows: bytes
    counts: bytes
    guided: bytes = b""


class Masks(Message, frozen=True):
    """Scheduler → rank: which tokens the guided rows of a step may sample. It may come before or after the step's plan.

    rows: one number for each of the plan's guided rows, in its order: which mask below is its own, -1 where everything
    is allowed. kinds: one for each mask, `masks.ONLY` these ids, all `masks.EXCEPT` these ids, or `masks.BITS`. counts:
    how many ids it has (0 for BITS). ids: int32, of all masks one after the other, ascending within each. bits: uint32,
    of all BITS masks one after the other, ceil(vocab / 32) words each, the lowest bit of the first is token 0.
    """

    step: int
    rows: bytes
    kinds: bytes
    counts: bytes
    ids: bytes
    bits: bytes


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True):
    """Log-probabilities (natural, after no temperature, penalties or filters: of the raw logits) at one position.

    position: of the token in the sequence. top_ids: int32, most likely first. top_logprobs: float32.
    rank: how many tokens of the vocabulary are at least as likely (1 is the most likely).
    """

    row: int
    position: int
    token_id: int
    logprob: float
    rank: int
    top_ids: bytes
    top_logprobs: bytes


class RowFault(msgspec.Struct, array_like=True, frozen=True):
    """One row's work failed alone (a bad bias, say); the others of the step are good."""

    row: int
    message: str


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
    logprobs: list[TokenLogprobs] = []
    faults: list[RowFault] = []
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


# ── clients ↔ service ────────────────────────────────────────────────────────────────────────────────────────────────


class Submit(Message, frozen=True, kw_only=True):
    """A request. tokens: int32 prompt. timeout: seconds from acceptance to the end, 0 is none.

    cache_salt: requests share cached prefixes only within one salt. With `params.n` > 1 the outputs carry `index`.
    tenant: on whose account, for policies and bounds by tenant.
    outputs: of a request that another server, or this one, had begun and lost: the output that the client has of each
    continuation, int32; none for a new request. ended: continuations that need nothing more. key: the client's secret
    name for the request, the same each time that it is sent; "" is for one that will not be sent again.
    traceparent, tracestate: of the caller's span, as W3C's Trace Context writes them; "" for none.
    """

    id: str
    tokens: bytes
    params: SamplingParams
    timeout: float = 0.0
    priority: int = 0
    cache_salt: str = ""
    tenant: str = ""
    outputs: list[bytes] = []
    ended: list[int] = []
    key: str = ""
    traceparent: str = ""
    tracestate: str = ""


class Abort(Message, frozen=True):
    """Ends a request, or with `index` one of its continuations (-1: all). An unknown id is no error."""

    id: str
    index: int = -1


class Delta(Message, frozen=True):
    """New tokens of one continuation of a request. finish: "" while it runs, else why it ended.

    finish is one of "stop" (EOS or a stop token id; `stop_token` says which, or -1), "length", "abort", "deadline",
    "error" (then `error_code` and `error` say what).
    """

    id: str
    index: int
    tokens: list[int]
    finish: str = ""
    stop_token: int = -1
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    error_code: str = ""
    error: str = ""


class Deltas(Message, frozen=True):
    """Service → client: what one step brought to all its requests.

    tokens: by request id, where one token of continuation 0 is all there is to say, as nearly always. items: the rest.
    number: counts from 1 within a session.
    """

    items: list[Delta]
    tokens: dict[str, int] = {}
    number: int = 0

    def each(self) -> Iterator[Delta]:
        """Everything in the long form, for readers that do not mind an object per token."""
        yield from (Delta(request_id, 0, [token]) for request_id, token in self.tokens.items())
        yield from self.items


class Refused(Message, frozen=True):
    """The message with this id was not accepted (id "" where it could not be read)."""

    id: str
    code: str
    message: str
    retry_after: float = 0.0


class InfoRequest(Message, frozen=True):
    """kind: "server", "tokenizer", "stats", "metrics" or "health"; answered by the message of that name."""

    id: str
    kind: str


class Drain(Message, frozen=True):
    """Client → service, over ipc only: finish within `grace` seconds, take nothing new, end. Answered by Done."""

    id: str
    grace: float


class Reload(Message, frozen=True):
    """Client → service, over ipc only: go on with the weights of `model`, of the same shape. Answered by Done."""

    id: str
    model: str


class Record(Message, frozen=True):
    """Client → service, over ipc only: record what happens for some seconds. Answered by Timeline."""

    id: str
    seconds: float


class RankTimes(msgspec.Struct, array_like=True, frozen=True):
    """Of one rank in one step, in microseconds."""

    rank: int
    began: int
    forward: int
    sample: int


class StepTimes(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """One step. Times in microseconds of the machine's monotonic clock: its plan was begun, ready and out, its results
    were back and applied, its tokens began to be delivered, and were.

    uses, counts: int32, of each row that it computes, which of the timeline's uses that is and how many tokens. chunks:
    those that are prefills; parts: those of them that end before the last known token, and sample nothing.
    """

    number: int
    tokens: int
    plan: int
    ready: int
    out: int
    back: int = 0
    applied: int = 0
    deliver: int = 0
    delivered: int = 0
    ranks: list[RankTimes] = []
    uses: bytes
    counts: bytes
    chunks: bytes
    parts: bytes


class RowUse(msgspec.Struct, array_like=True, frozen=True):
    """One continuation in one row, without a break. how: "" while it lasts; "preempted", "lost", or its finish."""

    row: int
    request: str
    continuation: int
    prompt_tokens: int
    began: int
    ended: int = 0
    how: str = ""


class Timeline(Message, frozen=True, kw_only=True):
    """What happened between `began` and `ended`. losses: of engine groups. full: later steps had no room."""

    id: str = ""
    began: int
    ended: int
    steps: list[StepTimes]
    uses: list[RowUse]
    losses: list[int]
    full: bool


class Done(Message, frozen=True):
    id: str
    detail: str = ""


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

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were served from the prefix cache."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """Share of blocks owned by running requests."""
        return self.blocks_used / self.blocks_total if self.blocks_total else 0.0


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
    histograms: list[HistogramFigures] = []
    tenants: list[TenantFigures] = []
    refused: dict[str, int] = {}
    losses: dict[str, int] = {}
    traces: dict[str, int] = {}


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


class Ping(Message, frozen=True):
    """Client → service: I live, do you? nonce: how many messages the client has sent, this one included.

    Scheduler → rank: nothing; that it can be sent is what it tells.
    """

    nonce: int


class Pong(Message, frozen=True):
    """incarnation: of the server and of this client's session in it; another one means that requests are gone.

    received: messages in this session. Where `nonce - received` changes within a session, some were lost on the way.
    """

    nonce: int
    incarnation: str
    received: int = 0


EngineMessage = Hello | Loading | Ready | StepResult | Failure
PlanMessage = Configure | StepPlan | Masks | Ping | Shutdown
ControlMessage = Drain | Reload
ClientMessage = Submit | Abort | InfoRequest | Ping | Drain | Reload | Record
Answer = ServerInfo | TokenizerInfo | Stats | ServiceMetrics | Timeline | Health | Done
ServiceMessage = Deltas | Refused | Answer | Pong
