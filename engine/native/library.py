"""The functions of the C library and their types; what they do is said in the sources.

Addresses are plain integers (`Tensor.data_ptr()`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any


class Native:
    """Raises OSError when the file is not such a library. The GIL is released during every call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        pointer, long = c_void_p, c_int64
        try:
            library = ctypes.CDLL(str(path))
            declared = partial(_declared, library)
            self.rms_norm = declared("rms_norm", None, *[pointer] * 4, long, long, c_float, c_int)
            self.silu_mul = declared("silu_mul", None, pointer, pointer, long, long, c_int)
            self.rope_store = declared("rope_store", None, *[pointer] * 9, c_float, *[long] * 5, c_int)
            self.linear_elements = declared("linear_elements", long, long, long)
            self.linear_pack = declared("linear_pack", None, pointer, pointer, long, long, c_int)
            self.linear = declared("linear", None, pointer, long, pointer, pointer, pointer, long, long, long, c_int)
            self.blocks_bytes = declared("blocks_bytes", long, long, long, c_int)
            self.blocks_pack = declared("blocks_pack", None, pointer, pointer, long, long, c_int, c_int)
            self.blocks_unpack = declared("blocks_unpack", None, pointer, pointer, long, long, c_int)
            self.blocks_linear = declared(
                "blocks_linear", None, pointer, long, pointer, c_int, pointer, pointer, long, long, long, c_int
            )
            self.blocks_rows = int(library.treadle_blocks_rows())
            self.decode_attention = declared(
                "decode_attention",
                c_int,
                *(pointer, long, pointer, pointer, pointer, long, pointer, pointer),
                *(long, long, long, long, long, c_float, long, c_int),
            )
            self.prefill_attention = declared(
                "prefill_attention",
                c_int,
                *(pointer, long, pointer, pointer, pointer, pointer, long, long),
                *(long, long, long, long, c_float, long, c_int),
            )
            self.keep_memory = declared("keep_memory", None)
            self.group_bytes = declared("group_bytes", c_size_t, c_int, c_size_t)
            self.group_join = declared("group_join", c_int, pointer, c_int)
            self.group_new = declared("group_new", pointer, pointer, c_int, c_int, c_size_t, c_double, c_double)
            self.group_free = declared("group_free", None, pointer)
            self.barrier = declared("barrier", c_int, pointer)
            self.all_reduce = declared("all_reduce", c_int, pointer, pointer, c_size_t, c_int)
            self.all_gather = declared("all_gather", c_int, pointer, pointer, pointer, c_size_t)
            self.max_ranks = int(library.treadle_max_ranks())
        except AttributeError as error:
            raise OSError(f"{path} lacks a function: {error}") from error


def _declared(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """The function of that name. Raises AttributeError where there is none."""
    function = library[f"treadle_{name}"]
    function.restype, function.argtypes = result, arguments
    return function
