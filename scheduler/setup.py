"""From options and model facts to what the core and the ranks are told."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import ConfigError
from treadle.transport.mask_pages import can_share
from treadle.transport.masks import words_for
from treadle.transport.messages import Configure, Ready

from .config import CoreConfig
from .options import ModelFacts, ServiceOptions

_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


@dataclass(slots=True, frozen=True)
class Held:
    """What every rank of a group holds: blocks on its device and in host memory, and seconds that one takes to move."""

    num_blocks: int
    swap_blocks: int = 0
    swap_out_seconds: float = 0.0
    swap_in_seconds: float = 0.0


def held(ready: Iterable[Ready]) -> Held:
    """Of ranks that agree on numbers; a step waits for the slowest of them."""
    ranks = list(ready)
    return Held(
        ranks[0].num_blocks,
        ranks[0].swap_blocks,
        max(rank.swap_out_seconds for rank in ranks),
        max(rank.swap_in_seconds for rank in ranks),
    )


def configure_message(facts: ModelFacts, options: ServiceOptions, directory: Path) -> Configure:
    """The message to every rank of this service. Raises ConfigError."""
    if options.tensor_parallel_size > facts.max_ranks:
        raise ConfigError(
            f"tensor_parallel_size={options.tensor_parallel_size}: {facts.name} can be split over at most "
            f"{facts.max_ranks} ranks, one attention head each"
        )
    if options.max_model_len > facts.context:
        raise ConfigError(f"max_model_len={options.max_model_len}: the model was made for {facts.context} at most")
    return Configure(
        model=facts.path,
        random_weights=options.random_weights,
        seed=options.weights_seed,
        world_size=options.tensor_parallel_size,
        device=options.device,
        dtype=resolve_dtype(options.dtype, options.device),
        kv_dtype=options.kv_dtype,
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        kv_cache_bytes=options.kv_cache_bytes,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len or facts.context,
        init_method="",
        threads=options.threads,
        native=options.native,
        shared_dir=str(directory),
        collective_timeout=max(options.start_timeout, options.step_timeout),
        debug=options.debug,
        cuda_graphs=options.cuda_graphs,
        overlap=options.overlap,
        gpu_memory_utilization=options.gpu_memory_utilization / (2 if options.standby else 1),
        attention_backend=options.attention_backend,
        fused_linears=options.fused_linears,
        fused_sums=options.fused_sums,
        overlap_sums=options.overlap_sums,
        swap_blocks=options.swap_blocks,
        swap_bytes=options.swap_bytes,
        mask_slots=options.pipeline_depth if options.device == "cuda" and can_share() else 0,
        mask_words=words_for(facts.vocab_size),
    )


def core_config(facts: ModelFacts, options: ServiceOptions, held: Held, max_model_len: int) -> CoreConfig:
    """The core's limits, once the ranks have said how many blocks they hold."""
    return CoreConfig(
        num_blocks=held.num_blocks,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=max_model_len,
        vocab_size=facts.vocab_size,
        pipeline_depth=options.pipeline_depth,
        prefix_cache=options.prefix_cache,
        max_prefill_chunk=options.max_prefill_chunk,
        max_waiting_requests=options.max_waiting_requests,
        max_waiting_tokens=options.max_waiting_tokens,
        max_tenant_requests=options.max_tenant_requests,
        max_tenant_tokens=options.max_tenant_tokens,
        policy=options.policy,
        target_tpot=options.target_tpot,
        watermark=options.watermark,
        reserve_output=options.reserve_output,
        eos_token_ids=facts.eos_token_ids,
        max_engine_failures=options.max_engine_failures,
        swap_blocks=held.swap_blocks,
        preemption=options.preemption,
        swap_out_seconds=held.swap_out_seconds,
        swap_in_seconds=held.swap_in_seconds,
    )


def check_same_shape(old: ModelFacts, new: ModelFacts) -> None:
    """Raises ConfigError unless a running service can go on with the weights of `new`."""
    for name in ("vocab_size", "context", "max_ranks", "eos_token_ids"):
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            raise ConfigError(
                f"{new.name}: its {name} is {after}, that of {old.name} {before}: only weights may change"
            )


def resolve_dtype(dtype: str, device: str) -> str:
    """ "auto" is bfloat16 where the device multiplies it in hardware, else float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" or _cpu_has_bf16() else "float32"


def _cpu_has_bf16() -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _BF16_FLAGS.isdisjoint(flags.split())
