"""Sizes that launches are made of."""

from __future__ import annotations

from functools import lru_cache

import torch

_SMS_OF_HOPPER = 132


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@lru_cache(maxsize=16)
def sm_count(device: torch.device) -> int:
    """Multiprocessors of the device; for interpreted kernels, those of a Hopper."""
    if device.type != "cuda":
        return _SMS_OF_HOPPER
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: fp32 exactly (the default would round its operands to tf32), others as they are."""
    return "ieee" if dtype is torch.float32 else "tf32"
