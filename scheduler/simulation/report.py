"""How it went, as plain values for JSON: the same for the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.errors import ConfigError
from treadle.scheduler.recording import config_to_log

from .fleet import Fleet, Part
from .histogram import Histogram
from .replica import NEVER
from .timeline import Moment, Timeline
from .workload import Workload

Floats = npt.NDArray[np.float64]
_PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Goals:
    """Service levels, in seconds: a request is good when it finishes with both held. 0 asks for nothing."""

    ttft: float = 0.0
    tpot: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("ttft", self.ttft), ("tpot", self.tpot)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"goal for {name}={value!r}: a number of seconds from 0 is allowed")


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds per request of the workload, NaN where there is none.

    ttft: to the first token. tpot: per output token after the first, for those that finished with two or more.
    end_to_end: to the end, for those that finished.
    """

    ttft: Floats
    tpot: Floats
    end_to_end: Floats


def latencies(workload: Workload, parts: Sequence[Part]) -> Latencies:
    first, finish = np.full(len(workload), NEVER), np.full(len(workload), NEVER)
    for part in parts:
        first[part.indices] = np.frombuffer(part.result.first)
        finish[part.indices] = np.frombuffer(part.result.finish)
    first[first == NEVER] = np.nan
    finish[finish == NEVER] = np.nan
    rest = np.where(workload.outputs > 1, workload.outputs - 1, np.nan)
    return Latencies(first - workload.arrival, (finish - first) / rest, finish - workload.arrival)


def build_report(fleet: Fleet, workload: Workload, parts: Sequence[Part], goals: Goals) -> dict[str, Any]:
    """Times in seconds, rates per second, shares from 0 to 1; see docs/simulator.md for each."""
    found = latencies(workload, parts)
    seconds = max(part.result.seconds for part in parts)
    span = seconds or 1.0  # nothing that took time: every rate is 0
    ends: Counter[str] = Counter()
    for part in parts:
        ends.update(part.result.ends)
    finished = np.isfinite(found.end_to_end)
    report = {
        "model": {
            "config": {**config_to_log(fleet.config), "policy": parts[0].result.policy},
            "costs": msgspec.structs.asdict(fleet.costs),
            "replicas": fleet.replicas,
            "routing": fleet.routing if fleet.replicas > 1 else None,
            "overhead": fleet.overhead,
        },
        "requests": {"offered": len(workload), "finished": int(finished.sum()), "ends": dict(sorted(ends.items()))},
        "seconds": seconds,
        "throughput": {
            "requests": finished.sum() / span,
            "input_tokens": workload.inputs[finished].sum() / span,
            "output_tokens": sum(part.result.stats["generated_tokens"] for part in parts) / span,
        },
        "ttft": spread(found.ttft),
        "tpot": spread(found.tpot),
        "end_to_end": spread(found.end_to_end),
        "between_tokens": _between(parts),
        "goodput": goodput(found, goals, span),
        "engine": _engine(parts),
        "cache": _cache(parts),
        "policy_errors": sum(part.result.stats["policy_errors"] for part in parts),
        "timeline": timeline(parts),
    }
    if len(workload.tenants) > 1:
        report["tenants"] = _tenants(workload, found)
    if len(parts) > 1:
        report["replicas"] = [_replica(part) for part in parts]
    rounded: dict[str, Any] = _rounded(report)
    return rounded


def spread(values: Floats) -> dict[str, float] | None:
    """Mean, percentiles and maximum of what there is."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    points = np.percentile(known, _PERCENTS).tolist()
    named = {f"p{percent}": point for percent, point in zip(_PERCENTS, points, strict=True)}
    return {"mean": float(known.mean()), **named, "max": float(known.max())}


def goodput(found: Latencies, goals: Goals, seconds: float) -> dict[str, Any]:
    """A request of one output token has no time per token and meets that goal."""
    good = np.isfinite(found.end_to_end)
    if goals.ttft:
        good &= found.ttft <= goals.ttft
    if goals.tpot:
        good &= ~(found.tpot > goals.tpot)
    count = int(good.sum())
    return {"goals": asdict(goals), "requests": count, "share": count / len(good), "per_second": count / seconds}


def _between(parts: Sequence[Part]) -> dict[str, float]:
    """Gaps between the tokens of a row that decodes, over all tokens, to 2%."""
    whole = Histogram()
    for part in parts:
        whole.merge(Histogram(part.result.between))
    return {"mean": whole.mean(), **{f"p{percent}": whole.percentile(percent) for percent in _PERCENTS}}


def _engine(parts: Sequence[Part]) -> dict[str, float]:
    """busy: share of the time until the last replica was done. rows: in a step, by its duration."""
    busy = sum(part.result.busy for part in parts)
    whole = (max(part.result.seconds for part in parts) or 1.0) * len(parts)
    return {
        "steps": sum(part.result.steps for part in parts),
        "busy": busy / whole,
        "rows": sum(part.result.row_seconds for part in parts) / busy if busy else 0.0,
    }


def _cache(parts: Sequence[Part]) -> dict[str, float]:
    stats = Counter[str]()
    for part in parts:
        stats.update(part.result.stats)
    shares = [moment.blocks / part.result.stats["blocks_total"] for part in parts for moment in part.result.timeline]
    return {
        "occupancy": float(np.mean(shares)) if shares else 0.0,
        "occupancy_peak": max(shares, default=0.0),
        "hit_rate": stats["cached_prompt_tokens"] / stats["prompt_tokens"] if stats["prompt_tokens"] else 0.0,
        "preemptions": stats["preemptions"],
        "evictions": stats["evictions"],
    }


def timeline(parts: Sequence[Part]) -> dict[str, Any]:
    """Sums over the replicas at regular times; occupancy is a mean. A replica that is done counts as empty."""
    width = max(part.result.width for part in parts)
    lines = [_at_width(part, width) for part in parts]
    length = max(len(line) for line in lines)
    padded = [line + [_end(part)] * (length - len(line)) for line, part in zip(lines, parts, strict=True)]
    blocks = parts[0].result.stats["blocks_total"] * len(parts)
    columns = list(zip(*padded, strict=True))
    return {
        "every": width,
        "running": [sum(moment.running for moment in column) for column in columns],
        "waiting": [sum(moment.waiting for moment in column) for column in columns],
        "occupancy": [sum(moment.blocks for moment in column) / blocks for column in columns],
        "generated": [sum(moment.generated for moment in column) for column in columns],
        "preemptions": [sum(moment.preemptions for moment in column) for column in columns],
    }


def _at_width(part: Part, width: float) -> list[Moment]:
    line = Timeline()
    line.width, line.moments = part.result.width, part.result.timeline
    return line.at_width(width)


def _end(part: Part) -> Moment:
    return Moment(0, 0, 0, part.result.stats["generated_tokens"], part.result.stats["preemptions"])


def _tenants(workload: Workload, found: Latencies) -> dict[str, Any]:
    return {
        name: {
            "offered": int((workload.tenant == number).sum()),
            "finished": int(np.isfinite(found.end_to_end[workload.tenant == number]).sum()),
            "ttft": spread(found.ttft[workload.tenant == number]),
            "tpot": spread(found.tpot[workload.tenant == number]),
        }
        for number, name in enumerate(workload.tenants)
    }


def _replica(part: Part) -> dict[str, Any]:
    result = part.result
    return {
        "requests": len(part.indices),
        "busy": result.busy / result.seconds if result.seconds else 0.0,
        "output_tokens": result.stats["generated_tokens"],
        "preemptions": result.stats["preemptions"],
    }


def _rounded(value: Any) -> Any:
    """Six significant digits: enough for anybody, and the same whatever added up in which order."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    return float(f"{float(value):.6g}") if isinstance(value, float | np.floating) else value
