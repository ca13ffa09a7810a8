"""Finds FlashInfer's compiled modules: in a directory of our own, or through FlashInfer, which compiles what it lacks.

A module is a shared library with the functions `plan` (on the host: who computes what) and `paged_run`. It speaks
apache-tvm-ffi, takes torch tensors as they are and launches on torch's current stream, whatever torch it is.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

# Directory with NAME/NAME.so, as scripts/build_flashinfer.sh makes it.
VARIABLE = "TREADLE_FLASHINFER_MODULES"
HEAD_DIMS = (64, 128)
_KINDS = ("fa2", "fa3")


class Module(Protocol):
    def plan(self, *arguments: Tensor | int | bool) -> Sequence[int]: ...

    def paged_run(self, *arguments: object) -> None: ...


def module_name(kind: str, head_dim: int) -> str:
    """FlashInfer's own name of the paged bfloat16 module without rotation, window and soft cap. kind: "fa2", "fa3"."""
    if kind not in _KINDS:
        raise ValueError(f"{kind!r}: there are {', '.join(_KINDS)}")
    return (
        "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32_"
        f"head_dim_qk_{head_dim}_head_dim_vo_{head_dim}_posenc_0_use_swa_False_use_logits_cap_False_f16qk_False"
        + ("_sm90" if kind == "fa3" else "")
    )


def prebuilt(kind: str, head_dim: int) -> Path | None:
    """The library in our own directory, if it is there."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        return None
    name = module_name(kind, head_dim)
    path = Path(directory) / name / f"{name}.so"
    return path if path.is_file() else None


def flashinfer_serves(
    device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, window: int | None
) -> bool:
    """Whether its prefill can be used: on Hopper, bfloat16, all keys in sight, and the module at hand."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device)[0] == 9
        and dtype is torch.bfloat16
        and kv_dtype is torch.bfloat16
        and window is None
        and head_dim in HEAD_DIMS
        and _installed("tvm_ffi")
        and (prebuilt("fa3", head_dim) is not None or _installed("flashinfer"))
    )


@functools.cache
def load_module(kind: str, head_dim: int) -> Module:
    """Loads a module; FlashInfer may compile it first, which takes minutes. Raises ImportError, RuntimeError."""
    path = prebuilt(kind, head_dim)
    if path is not None:
        import tvm_ffi  # type: ignore[import-not-found,unused-ignore]

        return tvm_ffi.load_module(str(path))
    from flashinfer.jit import gen_batch_prefill_module  # type: ignore[import-not-found,unused-ignore]

    bf16 = torch.bfloat16
    spec = gen_batch_prefill_module(
        kind, bf16, bf16, bf16, torch.int32, head_dim, head_dim, 0, False, False, False
    )  # fmt: skip
    return spec.build_and_load()


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
