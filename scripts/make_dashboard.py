"""Writes deploy/grafana/treadle.json from the table below, which is easier to read and to change than its 1,500 lines.

    .venv/bin/python scripts/make_dashboard.py [--check]

With --check nothing is written; exit code 1 when the file is not what the table says. Every query must return data from
a running server: scripts/check_dashboard.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "deploy" / "grafana" / "treadle.json"
BY = '{model_name=~"$model", instance=~"$instance"}'
HERE = '{instance=~"$instance"}'
WIDTH, HEIGHT = 8, 8


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend). unit: Grafana's name of it. about: what a person wants to know of it."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""


def quantiles(metric: str, *by: str) -> tuple[tuple[str, str], ...]:
    labels = ", ".join(("le", *by))
    legend = "".join(f"{{{{{name}}}}} " for name in by)
    return tuple(
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate(treadle:{metric}_bucket{BY}[$__rate_interval])))",
            f"{legend}p{p}",
        )
        for q, p in ((0.5, 50), (0.9, 90), (0.99, 99))
    )


def rate(metric: str, legend: str, *by: str, labels: str = BY) -> tuple[str, str]:
    group = f" by ({', '.join(by)})" if by else ""
    return f"sum{group} (rate(treadle:{metric}{labels}[$__rate_interval]))", legend


def mean(metric: str, legend: str, *by: str) -> tuple[str, str]:
    group = ", ".join(by)
    parts = (f"sum by ({group}) (rate(treadle:{metric}_{part}{BY}[$__rate_interval]))" for part in ("sum", "count"))
    return " / ".join(parts), legend


def gauge(metric: str, legend: str) -> tuple[str, str]:
    return f"treadle:{metric}{BY}", legend


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "How users fare",
        (
            Panel("Time to first token", "s", quantiles("time_to_first_token_seconds"), "From the HTTP request on."),
            Panel("Time per output token", "s", quantiles("time_per_output_token_seconds"), "After the first."),
            Panel("End to end", "s", quantiles("e2e_request_latency_seconds")),
            Panel(
                "How requests end",
                "reqps",
                (rate("request_success_total", "{{finished_reason}}", "finished_reason"),),
                "stop and length are good; abort: the client left; error: it could not be finished.",
            ),
            Panel(
                "HTTP answers",
                "reqps",
                (rate("http_requests_total", "{{status}}", "status", labels=HERE),),
                "429: refused for load. 503: no service behind the gateway.",
            ),
            Panel(
                "Open HTTP requests",
                "short",
                (
                    (f"treadle:http_open_requests{HERE}", "open {{instance}}"),
                    (f"sum (increase(treadle:http_disconnects_total{HERE}[$__rate_interval]))", "left early"),
                ),
            ),
        ),
    ),
    (
        "Load",
        (
            Panel(
                "Tokens",
                "short",
                (rate("generation_tokens_total", "generated/s"), rate("prompt_tokens_total", "prompts/s")),
            ),
            Panel(
                "Requests in the service",
                "short",
                (
                    gauge("num_requests_running", "running {{instance}}"),
                    gauge("num_requests_waiting", "waiting {{instance}}"),
                ),
            ),
            Panel(
                "Finished and refused",
                "reqps",
                (rate("requests_finished_total", "finished"), rate("requests_refused_total", "refused")),
            ),
            Panel("Prompt tokens of a request", "short", quantiles("request_prompt_tokens")),
            Panel("Tokens that a request generates", "short", quantiles("request_generation_tokens")),
            Panel(
                "What requests ask for",
                "short",
                (
                    *quantiles("request_params_max_tokens"),
                    *((q, "n " + p) for q, p in quantiles("request_params_n")[2:]),
                ),
            ),
        ),
    ),
    (
        "Memory",
        (
            Panel(
                "Cache in use",
                "percentunit",
                (gauge("kv_cache_usage_perc", "{{instance}}"),),
                "Blocks of running requests.",
            ),
            Panel("Blocks", "short", (gauge("kv_cache_blocks", "{{state}} {{instance}}"),)),
            Panel(
                "Prefix cache",
                "percentunit",
                (
                    (
                        f"sum (rate(treadle:prefix_cache_hits_total{BY}[$__rate_interval])) / "
                        f"sum (rate(treadle:prefix_cache_queries_total{BY}[$__rate_interval]))",
                        "hit rate now",
                    ),
                    gauge("prefix_cache_hit_rate", "since start {{instance}}"),
                ),
                "Share of the prompt tokens that need not be computed.",
            ),
            Panel(
                "Preemptions and evictions",
                "short",
                (rate("num_preemptions_total", "preemptions/s"), rate("kv_cache_evictions_total", "evicted blocks/s")),
                "Preemptions cost the work twice: the cache is too small for --max-num-seqs.",
            ),
        ),
    ),
    (
        "Host memory",
        (
            Panel(
                "Host memory in use",
                "percentunit",
                (gauge("cpu_cache_usage_perc", "{{instance}}"),),
                "Of --swap-space. Empty where there is none, like the others of this row.",
            ),
            Panel(
                "Blocks that move",
                "short",
                (rate("swapped_out_blocks_total", "out/s"), rate("swapped_in_blocks_total", "back/s")),
                "Out only: what moves is not asked for again.",
            ),
            Panel(
                "What it saves",
                "short",
                (
                    rate("cpu_prefix_cache_hits_total", "prompt tokens not computed/s"),
                    rate("num_swapped_preemptions_total", "preemptions by swap/s"),
                    rate("num_preemptions_total", "preemptions/s"),
                ),
                "The rest of the preemptions is computed again.",
            ),
        ),
    ),
    (
        "Where the time goes",
        (
            Panel("Waiting for a row", "s", quantiles("request_queue_time_seconds"), "From arrival to the first row."),
            Panel("Prefill", "s", quantiles("request_prefill_time_seconds"), "From the row to the first token."),
            Panel("Decode", "s", quantiles("request_decode_time_seconds"), "From the first token to the end."),
            Panel(
                "A step, by phase",
                "s",
                (mean("step_time_seconds", "{{phase}}", "phase"),),
                "Means. forward and sample lie within wait; plan, apply and deliver within the wait of the next step.",
            ),
            Panel(
                "In a row",
                "s",
                quantiles("request_inference_time_seconds"),
                "Prefill and decode together, per request.",
            ),
            Panel("Rows of a step", "short", quantiles("iteration_rows")),
            Panel("Tokens of a step", "short", quantiles("iteration_tokens_total")),
            Panel(
                "Traces",
                "reqps",
                (rate("trace_requests_total", "{{outcome}}", "outcome"),),
                "Requests with spans, where traces are on. dropped: the collector does not keep up.",
            ),
        ),
    ),
    (
        "Tenants",
        (
            Panel("Tokens by tenant", "short", (rate("tenant_generation_tokens_total", "{{tenant}}", "tenant"),)),
            Panel("Prompt tokens by tenant", "short", (rate("tenant_prompt_tokens_total", "{{tenant}}", "tenant"),)),
            Panel(
                "Prefix cache by tenant",
                "percentunit",
                (
                    (
                        f"sum by (tenant) (rate(treadle:tenant_cached_prompt_tokens_total{BY}[$__rate_interval])) / "
                        f"sum by (tenant) (rate(treadle:tenant_prompt_tokens_total{BY}[$__rate_interval]))",
                        "{{tenant}}",
                    ),
                ),
                "Share of a tenant's prompt tokens that need not be computed.",
            ),
            Panel(
                "Requests by tenant",
                "short",
                (
                    gauge("tenant_requests_running", "running {{tenant}}"),
                    gauge("tenant_requests_waiting", "waiting {{tenant}}"),
                ),
            ),
            Panel("Finished", "reqps", (rate("tenant_requests_finished_total", "{{tenant}}", "tenant"),)),
            Panel(
                "Refused",
                "reqps",
                (
                    rate("tenant_requests_refused_total", "{{tenant}}", "tenant"),
                    rate("requests_refused_total", "because of {{reason}}", "reason"),
                ),
                "queue: the bound of everybody; tenant and client: their own.",
            ),
        ),
    ),
    (
        "Health",
        (
            Panel("Healthy", "bool_yes_no", (gauge("healthy", "{{instance}}"),)),
            Panel("Age of the oldest step", "s", (gauge("step_age_seconds", "{{instance}}"),)),
            Panel("Steps", "short", (rate("steps_total", "steps/s {{instance}}", "instance"),)),
            Panel(
                "Engines lost, frames that could not be read",
                "short",
                (
                    (f"sum (increase(treadle:recoveries_total{BY}[$__rate_interval]))", "recoveries"),
                    (f"sum (increase(treadle:bad_frames_total{BY}[$__rate_interval]))", "bad frames"),
                ),
            ),
            Panel("Engine groups lost", "short", (gauge("engine_losses_total", "{{cause}} {{instance}}"),)),
            Panel(
                "Recovery",
                "s",
                (
                    (
                        f"treadle:recovery_time_seconds_sum{BY} / treadle:recovery_time_seconds_count{BY}",
                        "mean {{instance}}",
                    ),
                ),
                "From a loss to the next engines that serve; streams pause as long.",
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": _grid(0, y, 24, 1), "panels": []})
        y += 1
        for place, panel in enumerate(row):
            x = place % (24 // WIDTH) * WIDTH
            panels.append(_panel(panel, _grid(x, y + place // (24 // WIDTH) * HEIGHT, WIDTH, HEIGHT)))
        y += -(-len(row) // (24 // WIDTH)) * HEIGHT
    for number, one in enumerate(panels, 1):
        one["id"] = number
    return {
        "uid": "treadle",
        "title": "Treadle",
        "tags": ["treadle", "inference"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"},
                _variable("model", "Model", "label_values(treadle:healthy, model_name)"),
                _variable("instance", "Instance", "label_values(treadle:http_open_requests, instance)"),
            ]
        },
        "panels": panels,
    }


def _panel(panel: Panel, grid: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": grid,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}, "legend": {"displayMode": "list"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": source, "expr": query, "legendFormat": legend}
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _grid(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def main() -> int:
    text = json.dumps(dashboard(), indent=1) + "\n"
    if "--check" in sys.argv[1:]:
        current = TARGET.is_file() and TARGET.read_text() == text
        print(f"{TARGET} is {'current' if current else 'not what scripts/make_dashboard.py says: run it'}")
        return 0 if current else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
