"""Every option of a service, in one place. Unknown names are errors, wrong values say what is allowed."""

from __future__ import annotations

import math
import os

import msgspec

from treadle.errors import ConfigError

from .config import MOST_WATERMARK, check_service_levels, check_swap
from .tracing.start import check_endpoint

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")
ATTENTION_BACKENDS = ("auto", "triton", "flashinfer", "torch")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("tensor_parallel_size", 1, 1 << 16),
    ("block_size", 1, 1024),
    ("num_blocks", 0, 1 << 30),
    ("kv_cache_bytes", 0, 1 << 50),
    ("max_num_seqs", 1, 65_536),
    ("max_num_batched_tokens", 1, 1 << 20),
    ("max_model_len", 0, 1 << 24),
    ("pipeline_depth", 1, 8),
    ("max_waiting_requests", 0, 1 << 30),
    ("max_waiting_tokens", 1, 1 << 40),
    ("watermark", 0.0, MOST_WATERMARK),
    ("start_timeout", 0.1, 86_400),
    ("step_timeout", 0.1, 86_400),
    ("step_timeout_floor", 0.1, 86_400),
    ("journal_sync", 0.0, 3_600),
    ("stop_timeout", 0.0, 3_600),
    ("grammar_timeout", 0.01, 3_600),
    ("max_restarts", 0, 1_000),
    ("max_engine_failures", 1, 1_000),
    ("gpu_memory_utilization", 0.01, 1.0),
    ("swap_space", 0.0, float(1 << 14)),
    ("swap_blocks", 0, 1 << 30),
)


class ServiceOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one scheduler with its engine group.

    tensor_parallel_size: engine ranks. device: "cpu" or "cuda". dtype: of weights and activations; "auto" takes
    bfloat16 where the device has it and float32 elsewhere. kv_dtype: of the cache, "" for the same. block_size: tokens.
    num_blocks: of the cache; 0 takes them from kv_cache_bytes per rank; 0 again from what is free.
    max_num_seqs: rows. max_num_batched_tokens: budget of a step. max_prefill_chunk: of one request in a step, None is
    the budget. max_model_len: tokens of prompt and output, 0 is the model's own.
    pipeline_depth: steps in flight, 1 is synchronous. prefix_cache, native: switches. threads: of each rank.
    max_waiting_requests, max_waiting_tokens: bounds of the queue. max_tenant_requests, max_tenant_tokens: of each
    tenant's part of it, None for none. policy: name of the scheduling policy (docs/policies.md). target_tpot: seconds
    between tokens that prompts may not push steps over, None for most throughput. watermark: share of the blocks that
    admission leaves free. reserve_output: what it keeps for outputs to come, "estimate", "none" or "full".
    start_timeout, step_timeout, stop_timeout: seconds. step_timeout is what any step may take; step_timeout_floor what
    it may take at least, however short steps have been: between them the deadline is learned. standby: keep a second,
    loaded engine group, which takes as much memory again. journal: a file in which accepted requests survive the
    scheduler, "" for none; one service each. journal_sync: least seconds between two fsyncs of it. dump_dir: where the
    dump of a stuck step goes, "" is $XDG_STATE_HOME/treadle or ~/.local/state/treadle.
    otlp_traces_endpoint: URL of an OpenTelemetry collector that gets the spans of requests; "" is what the variables of
    the environment say, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and its like, or none (docs/observability.md).
    grammar_timeout: seconds that the grammar of a guided request may take to compile.
    swap_space: GiB of host memory, of each rank, for blocks that the device gives up; swap_blocks: the same as a number
    of blocks, which goes first; 0 is none (docs/swap.md). preemption: "auto" swaps where it costs less than computing
    again, "recompute" never, "swap" always.
    max_restarts: of the engine group without a finished step in between, before the service gives up.
    max_engine_failures: deaths of the engine group in a row that a request may be in flight at before it fails.
    random_weights: benchmarks only; the answers mean nothing. weights_seed: of random weights. debug: poisons freed
    memory and checks the core after every step. event_log: file that gets every input and decision of the core, ""
    for none; it holds token ids (docs/simulator.md).
    On "cuda": cuda_graphs, overlap: switches, for decode steps replayed from graphs and for steps that begin before the
    last one's tokens are back. gpu_memory_utilization: share of each GPU's memory that may be taken in all; what
    weights and a full step leave of it becomes the cache. attention_backend: "auto" is the fastest that is installed.
    fused_linears: a switch, for products of few rows by kernels that do what stands around them too. fused_sums: one
    for small sums over the ranks that take the residual and the norm along. overlap_sums: one for large sums of one
    half of a prefill's tokens while the other half is computed.
    """

    tensor_parallel_size: int = 1
    device: str = "cpu"
    dtype: str = "auto"
    kv_dtype: str = ""
    block_size: int = 16
    num_blocks: int = 0
    kv_cache_bytes: int = 0
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_prefill_chunk: int | None = None
    max_model_len: int = 0
    pipeline_depth: int = 2
    prefix_cache: bool = True
    native: bool = True
    threads: int = 1
    max_waiting_requests: int = 4096
    max_waiting_tokens: int = 4_000_000
    max_tenant_requests: int | None = None
    max_tenant_tokens: int | None = None
    policy: str = "priority"
    target_tpot: float | None = None
    watermark: float = 0.01
    reserve_output: str = "estimate"
    start_timeout: float = 600.0
    step_timeout: float = 120.0
    step_timeout_floor: float = 5.0
    stop_timeout: float = 5.0
    grammar_timeout: float = 10.0
    max_restarts: int = 5
    max_engine_failures: int = 3
    standby: bool = False
    journal: str = ""
    journal_sync: float = 0.1
    dump_dir: str = ""
    random_weights: bool = False
    weights_seed: int = 0
    debug: bool = False
    event_log: str = ""
    otlp_traces_endpoint: str = ""
    cuda_graphs: bool = True
    overlap: bool = True
    gpu_memory_utilization: float = 0.9
    attention_backend: str = "auto"
    fused_linears: bool = True
    fused_sums: bool = True
    overlap_sums: bool = True
    swap_space: float = 0.0
    swap_blocks: int = 0
    preemption: str = "auto"

    @property
    def swap_bytes(self) -> int:
        """Of each rank."""
        return int(self.swap_space * (1 << 30))


def service_options(**values: object) -> ServiceOptions:
    """ServiceOptions of checked values. Raises ConfigError that names the option and what is allowed."""
    try:
        options = msgspec.convert(values, ServiceOptions, strict=True)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(ServiceOptions))
        raise ConfigError(f"options: {error}; known options: {known}") from error
    cores = len(os.sched_getaffinity(0))  # more threads than that wait for each other, and a step never ends
    for name, low, high in (*_RANGES, ("threads", 1, cores)):
        _check_range(name, values.get(name, low), low, high)
    _check_bounds(options)
    _check_names(options)
    check_service_levels(options.policy, options.target_tpot, options.watermark, options.reserve_output)
    check_swap(options.preemption, options.swap_space > 0 or options.swap_blocks > 0, options.prefix_cache)
    if options.otlp_traces_endpoint:
        check_endpoint(options.otlp_traces_endpoint)
    return options


def _check_range(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}={value!r}: a number from {low} to {high} is allowed")
    if not low <= value <= high:
        raise ConfigError(f"{name}={value!r}: allowed is {low} to {high}")


def _check_bounds(options: ServiceOptions) -> None:
    """Of numbers that may be None, or have a hole in their range."""
    if options.max_prefill_chunk is not None and options.max_prefill_chunk < 1:
        raise ConfigError(f"max_prefill_chunk={options.max_prefill_chunk}: allowed is None or at least 1")
    for name, bound in (
        ("max_tenant_requests", options.max_tenant_requests),
        ("max_tenant_tokens", options.max_tenant_tokens),
    ):
        if bound is not None and bound < 1:
            raise ConfigError(f"{name}={bound!r}: allowed is None or at least 1")
    if options.num_blocks == 1:
        raise ConfigError("num_blocks=1: the first block is kept empty, so at least 2 are needed (0 is automatic)")


def _check_names(options: ServiceOptions) -> None:
    if options.device not in DEVICES:
        raise ConfigError(f"device={options.device!r}: allowed are {', '.join(DEVICES)}")
    if options.dtype not in ("auto", *DTYPES):
        raise ConfigError(f"dtype={options.dtype!r}: allowed are auto, {', '.join(DTYPES)}")
    if options.kv_dtype not in ("", *DTYPES):
        raise ConfigError(f"kv_dtype={options.kv_dtype!r}: allowed are '' (as dtype), {', '.join(DTYPES)}")
    if options.attention_backend not in ATTENTION_BACKENDS:
        raise ConfigError(
            f"attention_backend={options.attention_backend!r}: allowed are {', '.join(ATTENTION_BACKENDS)}"
        )


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler needs to know of the model.

    path: of the weights. context: the most tokens that the model was made for. max_ranks: of tensor parallelism.
    """

    name: str
    path: str
    vocab_size: int
    context: int
    max_ranks: int
    eos_token_ids: tuple[int, ...]
