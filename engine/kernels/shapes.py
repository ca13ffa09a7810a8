"""Sizes that launches are made of, and how kernels are launched.

The table of decode attention, `_DECODE`, is for measurements: `scripts/bench_attention.py --only variants` prints a
line for each number of rows and each length, with the `DecodeConfig` that was taken and the fastest one. Where another
one wins by some percent for few (or for many) rows at most lengths, it takes the place of the one here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_SMS_OF_HOPPER = 132


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


# Launch the next kernel while the one before it still runs; it then waits for its inputs by itself. Off until measured.
_DEPENDENT = os.environ.get("TREADLE_PDL", "0") != "0"


@lru_cache(maxsize=16)
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch whose kernel begins with `wait_for_inputs(PDL)`: Hopper's programmatic dependent launch."""
    if not _DEPENDENT or device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """To stand before a kernel's first access to memory.

    The order matters: whoever starts early because of the second line knows that all before this kernel has finished,
    so that waiting for this kernel is waiting for everything.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
