"""What runs and what waits, as text for a person. Ids and numbers only: prompts and answers are nobody's business."""

from __future__ import annotations

from .running import Running
from .waiting import Waiting

_MOST = 256


def snapshot(running: Running, waiting: Waiting) -> list[str]:
    """A line for each row and for the head of the queue."""
    rows, pool = running.rows, running.cache.pool
    lines = [f"blocks: {pool.used} used, {pool.cached} cached, {pool.total} in all"]
    sequences = running.sequences()
    lines.append(f"running: {len(sequences)} rows")
    for sequence in sequences[:_MOST]:
        row, request = sequence.row, sequence.request
        lines.append(
            f"  row {row}: {request.id}[{sequence.index}], prompt {request.prompt_len}, known {int(rows.known[row])}, "
            f"planned {int(rows.frontier[row])}, computed {int(rows.computed[row])}, limit {request.limit}, "
            f"blocks {int(rows.nblocks[row])}, failures {request.failures}"
        )
    lines.append(f"waiting: {len(waiting)} sequences, {waiting.tokens} tokens")
    for place, sequence in zip(range(_MOST), waiting, strict=False):
        request = sequence.request
        lines.append(
            f"  place {place}: {request.id}[{sequence.index}], prompt {request.prompt_len}, known {sequence.known}, "
            f"limit {request.limit}, in flight {sequence.in_flight}, failures {request.failures}"
        )
    return lines
