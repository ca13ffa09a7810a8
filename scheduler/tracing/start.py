"""Whether requests are traced, and where to."""

from __future__ import annotations

import logging
import os
from urllib.parse import urlsplit

from treadle.errors import ConfigError

from .exporter import TraceExporter

logger = logging.getLogger("treadle")
_TRACES, _EVERYTHING = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def start_tracing(endpoint: str, model: str) -> TraceExporter | None:
    """An exporter to `endpoint`, or to where OpenTelemetry's environment variables point; None where neither says.

    Raises ConfigError for an endpoint that cannot be used. What the environment asks for is meant for all programs:
    where it cannot be done, that is said in the log instead.
    """
    if endpoint:
        check_endpoint(endpoint)
    elif not _asked_for():
        return None
    try:
        from .spans import OtlpSender
    except ImportError as error:
        text = "traces: OpenTelemetry is not installed; pip install 'treadle[otel]'"
        if endpoint:
            raise ConfigError(text) from error
        logger.warning("%s", text)
        return None
    return TraceExporter(OtlpSender(endpoint, model))


def check_endpoint(endpoint: str) -> None:
    """Raises ConfigError."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r}: a URL is allowed, http://localhost:4318/v1/traces for example"
        )


def _asked_for() -> bool:
    if not (os.environ.get(_TRACES) or os.environ.get(_EVERYTHING)):
        return False
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() != "otlp":
        return False
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        logger.warning("traces: the environment asks for OTLP over %s, and there is only http/protobuf", protocol)
        return False
    return True
