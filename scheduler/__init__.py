"""Requests: admission, order, batching, preemption, plans and results, supervision. Never imports torch."""
