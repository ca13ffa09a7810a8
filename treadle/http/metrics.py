"""What Prometheus is told. Names and meanings follow vLLM's, with `treadle:` before them.

Two sources. The gateway times the requests that pass through it. The service counts for everybody, and is asked when
somebody looks, so its figures cost a step nothing; where several gateways front one service, each shows the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from treadle.outputs import RequestOutput
from treadle.transport.messages import Health, SamplingParams, ServiceMetrics, Stats

from .service_figures import ServiceFigures

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TPOT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_E2E = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
)
_TOKENS = tuple(float(10**power * step) for power in range(6) for step in (1, 2, 5))
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_BY_MODEL = ["model_name"]


class Metrics:
    """The registry of one gateway. It is our own: the program around us may have another."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.open_requests = 0
        self._observers: dict[str, _Observers] = {}
        open_now = Gauge("treadle:http_open_requests", "Generating HTTP requests open now", registry=registry)
        open_now.set_function(lambda: self.open_requests)
        self.disconnects = Counter(
            "treadle:http_disconnects",
            "Clients that left before their answer ended",
            registry=registry,
        )
        self.http_requests = Counter(
            "treadle:http_requests", "HTTP answers by path and status", ["path", "method", "status"], registry=registry
        )
        self._ttft = self._histogram("time_to_first_token_seconds", "From the HTTP request to its first token", _TTFT)
        self._tpot = self._histogram(
            "time_per_output_token_seconds", "Mean time between the tokens of a request after the first", _TPOT
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From the HTTP request to the last token", _E2E)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._written = self._histogram("request_generation_tokens", "Tokens that a request generated", _TOKENS)
        self._limit = self._histogram("request_params_max_tokens", "max_tokens of requests that give it", _TOKENS)
        self._n = self._histogram("request_params_n", "Continuations that a request asks for", _COUNTS)
        self._ends = Counter(
            "treadle:request_success",
            "Continuations by how they ended: stop, length, abort, error",
            ["model_name", "finished_reason"],
            registry=registry,
        )

    def opened(self) -> None:
        self.open_requests += 1

    def closed(self) -> None:
        self.open_requests -= 1

    def request(self, model: str, params: SamplingParams, began: float) -> Meter:
        """One prompt of an HTTP request. began: `time.perf_counter` when the request came."""
        observers = self._observers.get(model)
        if observers is None:
            observers = self._observers[model] = _Observers(
                ttft=self._ttft.labels(model),
                tpot=self._tpot.labels(model),
                e2e=self._e2e.labels(model),
                prompt=self._prompt.labels(model),
                written=self._written.labels(model),
                limit=self._limit.labels(model),
                n=self._n.labels(model),
                ends={reason: self._ends.labels(model, reason) for reason in ("stop", "length", "abort", "error")},
            )
        return Meter(observers, params, began)

    def page(self, model: str, stats: Stats | None, figures: ServiceMetrics | None, health: Health) -> bytes:
        """The text that Prometheus reads. stats, figures: None while the service does not answer."""
        service = CollectorRegistry()
        service.register(_Service(model, stats, health))
        if figures is not None:
            service.register(ServiceFigures(model, figures))
        return generate_latest(self.registry) + generate_latest(service)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"treadle:{name}", about, _BY_MODEL, buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class _Observers:
    """The metrics of one model, looked up once."""

    ttft: Histogram
    tpot: Histogram
    e2e: Histogram
    prompt: Histogram
    written: Histogram
    limit: Histogram
    n: Histogram
    ends: dict[str, Counter]


class Meter:
    """Follows one prompt of a request, from the HTTP request to its end."""

    def __init__(self, observers: _Observers, params: SamplingParams, began: float) -> None:
        self._to = observers
        self._n = params.n
        self._began = began
        self._first: float | None = None
        self._ended = False
        self._limit = params.max_tokens

    def saw(self, output: RequestOutput) -> None:
        """Takes what a reader of the request got."""
        if self._first is None and output.first_token_time is not None:
            self._first = output.first_token_time
            self._to.ttft.observe(self._first - self._began)
        if output.finished and not self._ended:
            self._ended = True
            self._finish(output)

    def end(self) -> None:
        """Nobody reads on: what has not ended was left or failed."""
        if not self._ended:
            self._ended = True
            self._to.ends["abort"].inc(self._n)

    def drop(self) -> None:
        """The request was refused: it never was one of ours."""
        self._ended = True

    def fail(self) -> None:
        """The request ended with an error."""
        if not self._ended:
            self._ended = True
            self._to.ends["error"].inc(self._n)

    def _finish(self, output: RequestOutput) -> None:
        now = time.perf_counter()
        written = [len(part.token_ids) for part in output.outputs]
        self._to.e2e.observe(now - self._began)
        self._to.n.observe(self._n)
        if self._limit is not None:
            self._to.limit.observe(self._limit)
        self._to.prompt.observe(len(output.prompt_token_ids))
        self._to.written.observe(sum(written))
        if self._first is not None and max(written) > 1:
            self._to.tpot.observe((now - self._first) / (max(written) - 1))
        for part in output.outputs:
            self._to.ends[part.finish_reason or "abort"].inc()


class _Service:
    """The service's own figures as metrics; lives for one look."""

    def __init__(self, model: str, stats: Stats | None, health: Health) -> None:
        self._model = model
        self._stats = stats
        self._health = health

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("healthy", "1 while the service makes progress or has nothing to do", self._is_ready)
        yield self._gauge("step_age_seconds", "How long the oldest step in flight has run", self._health.step_age)
        if self._stats is None:
            return
        stats = self._stats
        yield self._gauge("num_requests_running", "Continuations that run", stats.running)
        yield self._gauge("num_requests_waiting", "Continuations that wait", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of blocks that running requests own", stats.occupancy)
        blocks = GaugeMetricFamily("treadle:kv_cache_blocks", "Blocks of the KV cache", labels=["model_name", "state"])
        for state, count in (
            ("total", stats.blocks_total),
            ("used", stats.blocks_used),
            ("cached", stats.blocks_cached),
        ):
            blocks.add_metric([self._model, state], count)
        yield blocks
        yield self._gauge("prefix_cache_hit_rate", "Share of prompt tokens from the prefix cache", stats.hit_rate)
        for name, about, value in (
            ("prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens that the prefix cache served", stats.cached_prompt_tokens),
            ("kv_cache_evictions", "Cached blocks that were given up for others", stats.evictions),
            ("prompt_tokens", "Prompt tokens", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated", stats.generated_tokens),
            ("num_preemptions", "Requests that were preempted", stats.preemptions),
            ("recoveries", "Engine groups that were lost and replaced", stats.recoveries),
            ("requests_finished", "Requests that ended", stats.finished),
            ("bad_frames", "Messages that could not be read", stats.bad_frames),
            ("steps", "Steps finished", stats.step),
        ):
            yield self._counter(name, about, value)

    @property
    def _is_ready(self) -> float:
        return float(self._health.state == "ready")

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"treadle:{name}", about, labels=_BY_MODEL)
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"treadle:{name}", about, labels=_BY_MODEL)
        family.add_metric([self._model], value)
        return family
