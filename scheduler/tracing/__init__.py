"""Spans of requests for OpenTelemetry: recorded on the scheduler's loop as tuples, made and sent on another thread."""
