"""Kernels are compiled on a machine's first start, each for a second: many at a time, so that the start stays short.

Compilers run outside of Python's lock. Every kernel that a step launches is called once on numbers that mean nothing;
what must not be done by several threads, matrix products (each thread's cuBLAS takes its own workspace) and collectives
(ranks would call them in different orders), is left out. Later calls find everything in Triton's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from treadle.engine.batch import ForwardBatch
from treadle.engine.kv import KVCache
from treadle.engine.sampling.masks import LocalMasks
from treadle.transport.masks import encode_masks, words_for

from .graphs import ladder
from .program import StepProgram
from .rehearsal import attend_once, few_row_kinds, few_rows, operations

_THREADS = 12
_QUERIES = (2, 16, 64, 256, 1024)
Call = Callable[[], object]


class Echo:
    """A Communicator that talks to nobody: everyone has what it has."""

    def __init__(self, world_size: int) -> None:
        self.rank = 0
        self.world_size = world_size
        self.fused = None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0).repeat(self.world_size, *(1,) * x.dim())

    def barrier(self) -> None:
        return None


def warm(program: StepProgram, kv: KVCache, *, max_tokens: int, max_len: int, threads: int = _THREADS) -> None:
    """Has every kernel compiled and loaded. Raises what a call raises.

    Rows are nobody's and blocks the null block, whatever the lengths: nothing that is written here is ever read.
    """
    device = program.logits.device
    calls = _on_rows(program, device)
    for size in ladder(program.rows.max_rows):
        calls.append(partial(attend_once, program.model, _batch(program, [1] * size, max_len, device), kv))
    # One after the other: a backend may keep the plan of a prefill in one place.
    lengths = [count for count in _QUERIES if count <= min(max_tokens, max_len)]
    calls.append(partial(_attend_all, program, [_batch(program, [count], count, device) for count in lengths], kv))
    for counts in ([1], [3, 4]):
        batch = _batch(program, counts, max(counts), device)
        calls += operations(program.model, batch, kv)
    for smaller, rows in pairwise((0, *few_row_kinds(program.model))):
        if smaller < max_tokens:
            calls += few_rows(program.model, rows)
    if program.fused is not None:
        echo = Echo(program.fused.world_size)
        for filtered in (True, False):
            calls += [partial(_sample, program, size, filtered, echo) for size in {1, program.rows.max_rows}]
        calls.append(partial(program.mask, _any_masks(program.rows.vocab_size)))
    _run(calls, device, threads)


def _any_masks(vocab_size: int) -> LocalMasks:
    """Of one row, with a word that is given."""
    words = np.zeros((1, words_for(vocab_size)), np.uint32)
    words[0, 0] = 1
    masks = encode_masks(0, words, np.zeros(1, np.bool_))
    return LocalMasks.of(masks, np.zeros(1, np.int64), 0, vocab_size, vocab_size)


def _run(calls: list[Call], device: torch.device, threads: int) -> None:
    """All on the current stream: they share scratch memory, so they must run one after the other there."""
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def one(call: Call) -> None:
        if stream is not None:
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
        call()

    one(calls[0])  # alone: it sets Triton up
    if threads == 1:
        for call in calls[1:]:
            one(call)
        return
    with ThreadPoolExecutor(threads, "compile") as pool:
        for outcome in [pool.submit(one, call) for call in calls[1:]]:
            outcome.result()


def _batch(program: StepProgram, counts: list[int], max_context: int, device: torch.device) -> ForwardBatch:
    starts = [0, *accumulate(counts)]
    zeros = torch.zeros(starts[-1], dtype=torch.int64, device=device)
    rows = program.rows
    return ForwardBatch(
        token_ids=zeros,
        positions=zeros,
        slots=zeros,
        query_starts=starts,
        context_lens=torch.tensor(counts, dtype=torch.int32, device=device),
        max_context=max_context,
        block_tables=None,
        num_decode=len(counts) if max(counts) == 1 else 0,
        sample_index=None,
        rows=torch.full((len(counts),), rows.spare, dtype=torch.int32, device=device),
        table=rows.table,
        query_starts_device=torch.tensor(starts, dtype=torch.int32, device=device),
        max_query_len=max(counts),
        context_lens_host=counts,
    )


def _attend_all(program: StepProgram, batches: list[ForwardBatch], kv: KVCache) -> None:
    for batch in batches:
        attend_once(program.model, batch, kv)


def _sample(program: StepProgram, size: int, filtered: bool, echo: Echo) -> None:
    if program.fused is not None:
        numbers = torch.full((size,), program.rows.spare, dtype=torch.int32, device=program.logits.device)
        program.fused(program.logits[:size], numbers, numbers.long(), filtered, echo)


def _on_rows(program: StepProgram, device: torch.device) -> list[Call]:
    rows = program.rows
    narrow = torch.full((1,), rows.spare, dtype=torch.int32, device=device)
    wide, none = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1], dtype=torch.int32, device=device)
    spans = torch.zeros((3, 1), dtype=torch.int64, device=device)
    out, trash = torch.zeros(2, dtype=torch.float64, device=device), wide + rows.trash
    address = none + rows.spare * rows.table.shape[1]
    ops, history, table = rows.ops, rows.history, rows.table
    return [
        partial(ops.write_spans, history.view(-1), spans, none, 1),
        partial(ops.prepare, history, table, narrow, wide, address, none, wide.clone()),
        partial(ops.expand, history, table, narrow, none, starts, rows.block_size, 1, 1),
        partial(ops.finish, history, trash, wide, out[:1], out),
    ]
