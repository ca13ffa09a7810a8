"""The service's histograms, refusals and tenants, as Prometheus is told them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from treadle.transport.messages import HistogramFigures, ServiceMetrics, TenantFigures

_ABOUT: Mapping[str, str] = {
    "request_queue_time_seconds": "From the arrival of a continuation until it first gets a row",
    "request_prefill_time_seconds": "From its first row to its first token",
    "request_decode_time_seconds": "From its first token to its end",
    "request_inference_time_seconds": "From its first row to its end",
    "recovery_time_seconds": "From the loss of an engine group to the next one that serves",
    "iteration_tokens_total": "Tokens that a step computes",
    "iteration_rows": "Rows that a step computes",
    "step_time_seconds": "Where the time of a step goes, by phase",
}


class ServiceFigures:
    """A collector that lives for one look."""

    def __init__(self, model: str, metrics: ServiceMetrics) -> None:
        self._model = model
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._histograms(self._metrics.histograms)
        for name, about, label, counts in (
            ("requests_refused", "Requests that were refused, by reason", "reason", self._metrics.refused),
            ("engine_losses", "Engine groups that were lost, by cause", "cause", self._metrics.losses),
            ("trace_requests", "Traced requests, by what became of them", "outcome", self._metrics.traces),
        ):
            family = CounterMetricFamily(f"treadle:{name}", about, labels=["model_name", label])
            for value, count in counts.items():
                family.add_metric([self._model, value], count)
            yield family
        yield from self._tenants(self._metrics.tenants)

    def _histograms(self, histograms: list[HistogramFigures]) -> Iterator[Metric]:
        families: dict[str, HistogramMetricFamily] = {}
        for figures in histograms:
            family = families.get(figures.name)
            if family is None:
                labels = ["model_name", "phase"] if figures.phase else ["model_name"]
                about = _ABOUT.get(figures.name, figures.name)
                family = HistogramMetricFamily(f"treadle:{figures.name}", about, labels=labels)
                families[figures.name] = family
            values = [self._model, figures.phase] if figures.phase else [self._model]
            family.add_metric(values, _buckets(figures), figures.total)
        yield from families.values()

    def _tenants(self, tenants: list[TenantFigures]) -> Iterator[Metric]:
        labels = ["model_name", "tenant"]
        running = GaugeMetricFamily("treadle:tenant_requests_running", "Continuations that run", labels=labels)
        waiting = GaugeMetricFamily("treadle:tenant_requests_waiting", "Continuations that wait", labels=labels)
        prompt = CounterMetricFamily("treadle:tenant_prompt_tokens", "Prompt tokens", labels=labels)
        cached = CounterMetricFamily("treadle:tenant_cached_prompt_tokens", "Of them, from the cache", labels=labels)
        generated = CounterMetricFamily("treadle:tenant_generation_tokens", "Tokens generated", labels=labels)
        finished = CounterMetricFamily("treadle:tenant_requests_finished", "Requests that ended", labels=labels)
        refused = CounterMetricFamily("treadle:tenant_requests_refused", "Requests that were refused", labels=labels)
        for tenant in tenants:
            values = [self._model, tenant.name]
            running.add_metric(values, tenant.running)
            waiting.add_metric(values, tenant.waiting)
            prompt.add_metric(values, tenant.prompt_tokens)
            cached.add_metric(values, tenant.cached_prompt_tokens)
            generated.add_metric(values, tenant.generated_tokens)
            finished.add_metric(values, tenant.finished)
            refused.add_metric(values, tenant.refused)
        yield from (running, waiting, prompt, cached, generated, finished, refused)


def _buckets(figures: HistogramFigures) -> list[tuple[str, float]]:
    """Prometheus counts each bucket with those below it."""
    bounds = [*(str(bound) for bound in figures.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(figures.counts)), strict=True))
