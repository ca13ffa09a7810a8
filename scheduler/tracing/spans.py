"""From what was recorded of a request to OpenTelemetry's spans, and to a collector by OTLP over HTTP.

Attributes have the names that vLLM gives them, where they mean the same. The provider is our own: the program around us
may have another.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from opentelemetry.context import Context, attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from treadle.scheduler.request_trace import Part, RequestTrace

_SUPPRESS = "suppress_instrumentation"
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class OtlpSender:
    """endpoint: a URL, or "" for what OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and its like say. model: its name."""

    def __init__(self, endpoint: str, model: str) -> None:
        self._model = model
        self._made = _Collected()
        self._exporter = OTLPSpanExporter(endpoint=endpoint or None)
        provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        provider.add_span_processor(self._made)
        self._tracer = provider.get_tracer("treadle")

    def send(self, traces: Sequence[RequestTrace]) -> bool:
        for trace in traces:
            make_spans(self._tracer, trace, self._model)
        spans = self._made.take()
        token = attach(Context({_SUPPRESS: True}))  # a program that traces its HTTP calls is not to see this one
        try:
            return not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS
        finally:
            detach(token)

    def shutdown(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _Collected(SpanProcessor):
    """Keeps what has ended until it is taken: who sends is not to be found by a second queue."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        spans, self._spans = self._spans, []
        return spans


def make_spans(tracer: Tracer, trace: RequestTrace, model: str) -> None:
    """One for the request, whose parent is the caller's, and one for each of its parts."""
    zero = time.time_ns() - time.perf_counter_ns()

    def wall(at: float) -> int:
        return zero + round(at * 1e9)

    submit = trace.submit
    headers = {"traceparent": submit.traceparent, "tracestate": submit.tracestate}
    caller = TraceContextTextMapPropagator().extract({k: v for k, v in headers.items() if v}, Context())
    root = tracer.start_span(
        "llm_request", caller, SpanKind.SERVER, _about(trace, model), start_time=wall(trace.arrived)
    )
    if root.is_recording():
        inside = set_span_in_context(root, Context())
        for part in trace.parts:
            span = tracer.start_span(
                part.name, inside, attributes=_about_part(part, submit.params.n), start_time=wall(part.began)
            )
            span.end(wall(part.ended))
        if any(end.finish == "error" for end in trace.ends):
            root.set_status(Status(StatusCode.ERROR))
    root.end(wall(max((end.at for end in trace.ends), default=trace.arrived)))


def _about(trace: RequestTrace, model: str) -> Attributes:
    submit, params, ends = trace.submit, trace.submit.params, trace.ends
    about: dict[str, str | bool | int | float | Sequence[str]] = {
        "gen_ai.request.id": submit.id,
        "gen_ai.response.model": model,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.prompt_tokens": trace.prompt_tokens,
        "gen_ai.usage.completion_tokens": sum(end.tokens for end in ends),
        "gen_ai.usage.cached_tokens": sum(end.cached for end in ends),
        "gen_ai.response.finish_reasons": [end.finish for end in sorted(ends)],
        "treadle.tenant": submit.tenant,
        "treadle.priority": submit.priority,
        "treadle.preemptions": sum(part.name == "preempted" for part in trace.parts),
        "treadle.recoveries": sum(part.name == "recovery" for part in trace.parts),
    }
    if params.max_tokens is not None:
        about["gen_ai.request.max_tokens"] = params.max_tokens
    if trace.left_out:
        about["treadle.spans_left_out"] = trace.left_out
    return about | _latencies(trace)


def _latencies(trace: RequestTrace) -> dict[str, float]:
    """In seconds; of several continuations the first that got there, and the last that ended."""
    over = max((end.at for end in trace.ends), default=trace.arrived)
    scheduled = min((end.scheduled for end in trace.ends if end.scheduled), default=0.0)
    first = min((end.first for end in trace.ends if end.first), default=0.0)
    found = {"e2e": over - trace.arrived}
    if scheduled:
        found |= {"time_in_queue": scheduled - trace.arrived, "time_in_model_inference": over - scheduled}
    if first:
        found |= {"time_to_first_token": first - trace.arrived}
        found |= {"time_in_model_prefill": first - scheduled, "time_in_model_decode": over - first}
    return {f"gen_ai.latency.{name}": seconds for name, seconds in found.items()}


def _about_part(part: Part, n: int) -> Attributes:
    about: dict[str, int] = {}
    if part.name in ("prefill", "decode"):
        about["treadle.tokens"] = part.tokens
    if part.step >= 0:
        about["treadle.step"] = part.step
    if n > 1:
        about["treadle.continuation"] = part.continuation
    return about


def _resource() -> Resource:
    """Named "treadle" where the environment names nothing else."""
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    return Resource.create({} if named else {"service.name": "treadle"})
