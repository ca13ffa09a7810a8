"""The functions of the C library and their types; what they do is said in the sources.

Addresses are plain integers (`Tensor.data_ptr()`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path


class Native:
    """Raises OSError when the file is not such a library. The GIL is released during every call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            self.rms_norm = library.treadle_rms_norm
            self.silu_mul = library.treadle_silu_mul
            self.rope_store = library.treadle_rope_store
            self.linear_elements = library.treadle_linear_elements
            self.linear_pack = library.treadle_linear_pack
            self.linear = library.treadle_linear
            self.blocks_bytes = library.treadle_blocks_bytes
            self.blocks_pack = library.treadle_blocks_pack
            self.blocks_unpack = library.treadle_blocks_unpack
            self.blocks_linear = library.treadle_blocks_linear
            self.blocks_rows = int(library.treadle_blocks_rows())
            self.decode_attention = library.treadle_decode_attention
            self.prefill_attention = library.treadle_prefill_attention
            self.keep_memory = library.treadle_keep_memory
            self.group_bytes = library.treadle_group_bytes
            self.group_join = library.treadle_group_join
            self.group_new = library.treadle_group_new
            self.group_free = library.treadle_group_free
            self.barrier = library.treadle_barrier
            self.all_reduce = library.treadle_all_reduce
            self.all_gather = library.treadle_all_gather
            self.max_ranks = int(library.treadle_max_ranks())
        except AttributeError as error:
            raise OSError(f"{path} lacks a function: {error}") from error
        pointer, long = c_void_p, c_int64
        self.rms_norm.argtypes = [pointer] * 4 + [long, long, c_float, c_int]
        self.rms_norm.restype = None
        self.silu_mul.argtypes = [pointer, pointer, long, long, c_int]
        self.silu_mul.restype = None
        self.rope_store.argtypes = [pointer] * 9 + [c_float] + [long] * 5 + [c_int]
        self.rope_store.restype = None
        self.linear_elements.argtypes = [long, long]
        self.linear_elements.restype = long
        self.linear_pack.argtypes = [pointer, pointer, long, long, c_int]
        self.linear_pack.restype = None
        self.linear.argtypes = [pointer, long, pointer, pointer, pointer, long, long, long, c_int]
        self.linear.restype = None
        self.blocks_bytes.argtypes = [long, long, c_int]
        self.blocks_bytes.restype = long
        self.blocks_pack.argtypes = [pointer, pointer, long, long, c_int, c_int]
        self.blocks_pack.restype = None
        self.blocks_unpack.argtypes = [pointer, pointer, long, long, c_int]
        self.blocks_unpack.restype = None
        self.blocks_linear.argtypes = [pointer, long, pointer, c_int, pointer, pointer, long, long, long, c_int]
        self.blocks_linear.restype = None
        self.decode_attention.argtypes = [
            *(pointer, long, pointer, pointer, pointer, long, pointer, pointer),
            *(long, long, long, long, long, c_float, long, c_int),
        ]
        self.decode_attention.restype = c_int
        self.prefill_attention.argtypes = [
            *(pointer, long, pointer, pointer, pointer, pointer, long, long),
            *(long, long, long, long, c_float, long, c_int),
        ]
        self.prefill_attention.restype = c_int
        self.keep_memory.argtypes = []
        self.keep_memory.restype = None
        self.group_bytes.argtypes = [c_int, c_size_t]
        self.group_bytes.restype = c_size_t
        self.group_join.argtypes = [pointer, c_int]
        self.group_join.restype = c_int
        self.group_new.argtypes = [pointer, c_int, c_int, c_size_t, c_double, c_double, c_double]
        self.group_new.restype = pointer
        self.group_free.argtypes = [pointer]
        self.group_free.restype = None
        self.barrier.argtypes = [pointer]
        self.barrier.restype = c_int
        self.all_reduce.argtypes = [pointer, pointer, c_size_t, c_int]
        self.all_reduce.restype = c_int
        self.all_gather.argtypes = [pointer, pointer, pointer, c_size_t]
        self.all_gather.restype = c_int
