"""Execution on one rank: rows, models, tensor parallelism, attention, sampling, weights.

This file stays free of torch, so that `treadle.engine.config` and `treadle.engine.gguf` can be read without it.
"""
