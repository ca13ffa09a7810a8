"""A recording of the service in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing show.

Tracks: the scheduler's thread, the step in flight, each rank, and each row. Within a track nothing overlaps. Times are
microseconds since the recording began.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from treadle.transport.codec import unpack
from treadle.transport.messages import RowUse, StepTimes, Timeline

_SCHEDULER, _ENGINE, _ROWS = 1, 2, 3
_LOOP, _FLIGHT = 1, 2
Event = dict[str, Any]


def to_json(timeline: Timeline) -> bytes:
    return msgspec.json.encode({"traceEvents": list(events(timeline)), "displayTimeUnit": "ms"})


def events(timeline: Timeline) -> Iterator[Event]:
    """Every event, track by track."""
    yield from _names(timeline)
    yield from _scheduler(timeline)
    yield from _ranks(timeline)
    yield from _rows(timeline)
    if timeline.full:
        last = timeline.steps[-1].delivered if timeline.steps else timeline.began
        yield {"ph": "i", "s": "g", "name": "full", "pid": _SCHEDULER, "tid": 0, "ts": last - timeline.began}
    for at in timeline.losses:
        yield {"ph": "i", "s": "g", "name": "engine group lost", "pid": _ENGINE, "tid": 0, "ts": at - timeline.began}


def _slice(name: str, pid: int, tid: int, began: int, ended: int, **args: object) -> Event:
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": began, "dur": ended - began, "args": args}


def _names(timeline: Timeline) -> Iterator[Event]:
    tracks = {(_SCHEDULER, _LOOP): "scheduler", (_SCHEDULER, _FLIGHT): "step in flight"}
    tracks |= {(_ENGINE, times.rank): f"rank {times.rank}" for step in timeline.steps for times in step.ranks}
    tracks |= {(_ROWS, use.row): f"row {use.row}" for use in timeline.uses}
    for pid, name in ((_SCHEDULER, "scheduler"), (_ENGINE, "engine"), (_ROWS, "rows")):
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
    for (pid, tid), name in sorted(tracks.items()):
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _scheduler(timeline: Timeline) -> Iterator[Event]:
    zero = timeline.began
    for step, flight in zip(timeline.steps, _flights(timeline), strict=True):
        about = {"step": step.number}
        for name, began, ended in (
            ("plan", step.plan, step.ready),
            ("send", step.ready, step.out),
            ("apply", step.back, step.applied),
            ("deliver", step.deliver, step.delivered),
        ):
            yield _slice(name, _SCHEDULER, _LOOP, began - zero, ended - zero, **about)
        rows = len(step.uses) // 4
        yield _slice(f"step {step.number}", _SCHEDULER, _FLIGHT, *flight, **about, rows=rows, tokens=step.tokens)
        yield {"ph": "C", "name": "rows", "pid": _SCHEDULER, "tid": 0, "ts": flight[0], "args": {"rows": rows}}


def _flights(timeline: Timeline) -> Iterator[tuple[int, int]]:
    """When each step began, which is when it was out and the one before it was back, and when it was back itself."""
    before = 0
    for step in timeline.steps:
        yield max(step.out, before) - timeline.began, step.back - timeline.began
        before = step.back


def _ranks(timeline: Timeline) -> Iterator[Event]:
    ended: dict[int, int] = {}
    for step in timeline.steps:
        about = {"step": step.number, "rows": len(step.uses) // 4, "tokens": step.tokens}
        for times in step.ranks:
            free = ended.get(times.rank)
            began = times.began - timeline.began
            if free is not None and began > free:
                yield _slice("idle", _ENGINE, times.rank, free, began)
            began = began if free is None else max(began, free)
            sampling = max(began, times.began - timeline.began + times.forward)
            ended[times.rank] = sampling + times.sample
            yield _slice("forward", _ENGINE, times.rank, began, sampling, **about)
            if times.sample:
                yield _slice("sample", _ENGINE, times.rank, sampling, ended[times.rank], **about)


def _rows(timeline: Timeline) -> Iterator[Event]:
    for step, flight in zip(timeline.steps, _flights(timeline), strict=True):
        chunks, parts = set(unpack(step.chunks).tolist()), set(unpack(step.parts).tolist())
        for number, count in zip(unpack(step.uses).tolist(), unpack(step.counts).tolist(), strict=True):
            use = timeline.uses[number]
            discarded = _is_discarded(use, step)
            name = "discarded" if discarded else "prefill" if number in chunks else "decode"
            sampled = 0 if discarded or number in parts else 1
            about = {"request": use.request, "continuation": use.continuation, "step": step.number}
            yield _slice(name, _ROWS, use.row, *flight, **about, tokens=count, sampled=sampled)
    for use in timeline.uses:
        if use.how:
            at = use.ended - timeline.began
            about = {"request": use.request, "continuation": use.continuation}
            yield {"ph": "i", "s": "t", "name": use.how, "pid": _ROWS, "tid": use.row, "ts": at, "args": about}


def _is_discarded(use: RowUse, step: StepTimes) -> bool:
    """The sequence had ended when the step came back. What was in flight of a preempted one still counts."""
    return use.how not in ("", "preempted", "lost") and step.back >= use.ended
