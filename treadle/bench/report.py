"""From what happened to figures: percentiles, throughput, goodput, failures. Names in JSON are those of vLLM's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np

from treadle.errors import ConfigError

from .drive import Record, most_at_once

GOALS = ("ttft", "tpot", "e2el")
_PERCENTILES = (50, 90, 99)
_MS = 1000.0
_SHOWN = 160


@dataclass(frozen=True, slots=True)
class Goals:
    """Service levels in milliseconds: of "ttft", "tpot", "e2el". A request counts when it keeps all of them."""

    limits: Mapping[str, float]

    @classmethod
    def of(cls, words: Sequence[str]) -> Goals:
        """From "ttft:200", "tpot:50", as in vLLM's benchmark. Raises ConfigError."""
        limits = {}
        for word in words:
            name, colon, text = word.partition(":")
            try:
                value = float(text)
            except ValueError:
                value = 0.0
            if name not in GOALS or not colon or not (isfinite(value) and value > 0):
                raise ConfigError(f"goodput {word!r}: NAME:MILLISECONDS is allowed, with {', '.join(GOALS)} for names")
            limits[name] = value
        return cls(limits)

    def kept(self, record: Record) -> bool:
        found = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.end_to_end}
        return all(_MS * found[name] <= limit for name, limit in self.limits.items())


def build_report(records: Sequence[Record], goals: Goals) -> dict[str, Any]:
    """Seconds, tokens, and milliseconds where a name ends in `_ms`. Latencies are of the requests that succeeded."""
    good = [record for record in records if not record.error]
    duration = max((record.ended for record in records), default=0.0)
    inputs, outputs = sum(r.usage.input for r in good), sum(r.usage.output for r in good)

    def rate(count: float) -> float:
        return count / duration if duration > 0 else 0.0

    report: dict[str, Any] = {
        "requests": len(records),
        "completed": len(good),
        "failed": len(records) - len(good),
        "duration": duration,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": rate(len(good)),
        "output_throughput": rate(outputs),
        "total_token_throughput": rate(inputs + outputs),
        "max_concurrent_requests": most_at_once(records),
        "mean_concurrent_requests": rate(sum(r.ended - r.sent for r in records)),
    }
    if goals.limits:
        kept = sum(goals.kept(record) for record in good)
        report |= {"goodput_ms": dict(goals.limits), "good_requests": kept, "request_goodput": rate(kept)}
    tpot = [record.tpot for record in good]
    report |= _spread("ttft", [record.ttft for record in good])
    report |= _spread("tpot", [value for value in tpot if value is not None])
    report |= _spread("itl", [gap for record in good for gap in record.gaps])
    report |= _spread("e2el", [record.end_to_end for record in good])
    report |= _spread("late", [record.sent - record.due for record in records])
    report["errors"] = dict(Counter(record.error for record in records if record.error).most_common())
    report["error_examples"] = {record.error: record.message for record in reversed(records) if record.error}
    return report


def details(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One entry of each column is one request; seconds from the beginning, None for what did not come."""
    return {
        "due": [r.due for r in records],
        "sent": [r.sent for r in records],
        "first": [r.pieces[0] if r.pieces else None for r in records],
        "last": [r.pieces[-1] if r.pieces else None for r in records],
        "input_tokens": [r.usage.input for r in records],
        "output_tokens": [r.usage.output for r in records],
        "tenant": [r.ask.tenant for r in records],
        "error": [r.error for r in records],
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles and maximum in milliseconds; None where there is nothing to tell of."""
    values = _MS * np.asarray(seconds, np.float64)
    figures: dict[str, float | None] = {f"mean_{name}_ms": float(values.mean()) if values.size else None}
    for p in _PERCENTILES:
        label = "median" if p == 50 else f"p{p}"
        figures[f"{label}_{name}_ms"] = float(np.percentile(values, p)) if values.size else None
    figures[f"max_{name}_ms"] = float(values.max()) if values.size else None
    return figures


def table(report: Mapping[str, Any]) -> str:
    """For people."""
    r = report
    lines = [
        f"requests    {r['completed']} of {r['requests']} succeeded in {r['duration']:.2f} s: "
        f"{r['request_throughput']:.2f}/s",
        f"tokens      {r['total_input_tokens']} in, {r['total_output_tokens']} out: "
        f"{r['output_throughput']:.1f} output/s, {r['total_token_throughput']:.1f}/s in all",
        f"at once     {r['mean_concurrent_requests']:.1f} in the mean, {r['max_concurrent_requests']} at the most",
    ]
    if "request_goodput" in r:
        levels = ", ".join(f"{name} {limit:g} ms" for name, limit in r["goodput_ms"].items())
        share = r["good_requests"] / max(r["requests"], 1)
        lines.append(f"goodput     {r['request_goodput']:.2f}/s, {share:.0%} of the requests within {levels}")
    lines += ["", f"{'ms':<28}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}"]
    for name, label in (
        ("ttft", "time to first token"),
        ("tpot", "time per output token"),
        ("itl", "between pieces"),
        ("e2el", "end to end"),
        ("late", "sent after it was due"),
    ):
        figures = [r[f"{kind}_{name}_ms"] for kind in ("mean", "median", "p90", "p99", "max")]
        lines.append(f"{label:<28}" + "".join(f"{'–' if f is None else format(f, '.2f'):>10}" for f in figures))
    if r["errors"]:
        lines.append("")
        lines += [f"{n} × {kind}: {r['error_examples'][kind][:_SHOWN]}" for kind, n in r["errors"].items()]
    return "\n".join(lines)
