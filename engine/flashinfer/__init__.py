"""Attention kernels of FlashInfer, called without its Python package, which is imported only if it must compile."""

from .backend import FlashInferAttention, Heads, flashinfer_attention
from .modules import flashinfer_serves

__all__ = ["FlashInferAttention", "Heads", "flashinfer_attention", "flashinfer_serves"]
