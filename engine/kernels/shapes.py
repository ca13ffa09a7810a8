"""Sizes that launches are made of.

The table of decode attention, `_DECODE`, is for measurements: `scripts/bench_attention.py --only variants` prints a
line for each number of rows and each length, with the `DecodeConfig` that was taken and the fastest one. Where another
one wins by some percent for few (or for many) rows at most lengths, it takes the place of the one here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

_SMS_OF_HOPPER = 132
LOG2_E = 1.4426950408889634
"""Goes into the scale of attention, so that its kernels can use exp2."""


DECODE_PROGRAMS = 3


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How decode attention is compiled: keys per iteration, warps, depth of the software pipeline.

    fused: the last part of a row combines all, else a second launch does. programs: that splitting makes per
    multiprocessor, at most; as many as are resident at a time leave no second wave.
    """

    keys: int
    warps: int
    stages: int
    fused: bool = True
    programs: int = DECODE_PROGRAMS


# For 16-bit heads of more than 64 elements, by KV heads of all rows per multiprocessor: below the number, this one.
_DECODE = (
    (0.25, DecodeConfig(128, 4, 2)),
    (float("inf"), DecodeConfig(64, 4, 3)),
)


def decode_config(dim: int, dtype: torch.dtype, groups: int = 1 << 30, num_sms: int = _SMS_OF_HOPPER) -> DecodeConfig:
    """The static choice for heads of `dim` elements and `groups` rows times KV heads."""
    if dtype is torch.float32:
        return DecodeConfig(32, 4, 2)
    if dim <= 64:
        return DecodeConfig(128, 4, 3)
    return next(config for limit, config in _DECODE if groups < limit * num_sms)


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
