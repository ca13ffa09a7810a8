"""Triton on whatever is there: the GPU, or Triton's interpreter on the CPU. To be imported before any kernel."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is declared

pytest.importorskip("triton")


def _mend_interpreter() -> None:
    """What Triton 3.6's interpreter gets wrong.

    It makes loop bounds of one-element arrays in a way that NumPy 2.4 refuses. It keeps bfloat16 as bits in uint16:
    matrix products multiply those bits as integers, and conversions from float32 round toward zero. At each call of a
    function inside a kernel it patches the language again, though it is patched: a third of all its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def narrowing_cast(self: Any, source: Any, goal: Any) -> Any:
        if source.dtype.scalar == tl.float32 and goal.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, source, goal)

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = ((cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x) for x in (a, b))
        return dot(self, a, b, *rest)

    def call_inside(self: Any, *args: Any, **kwargs: Any) -> Any:
        languages = (seen for seen in self.fn.__globals__.values() if seen is tl or seen is tl.core)
        if any(tl.core.is_builtin(language.load) for language in languages):
            interpreter._patch_lang(self.fn)
        inside = self.rewrite()
        try:
            return inside(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang_tensor = patched
    interpreter.InterpretedFunction.__call__ = call_inside
    builder.cast_impl, builder.create_dot = narrowing_cast, wide_dot


def _remember() -> None:
    """What Triton's interpreter finds out again at every operation, and that is the same each time: half of its time.

    Which of the language to patch, the table of NumPy's types, the types and shapes of tensors. It also computes
    whether integers overflow, for a check that it then leaves out unless kernels are debugged.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, find_type = interpreter._patch_lang, interpreter._get_np_dtype
    changes: dict[tuple[bool, ...], list[tuple[object, str, object, object]]] = {}
    types: dict[str, np.dtype[Any]] = {}
    blocks: dict[tuple[object, ...], Any] = {}
    shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    scalar = tl.constexpr(1), tl.tuple([])

    def patch_again(fn: Any) -> Any:
        visible = tuple(value is tl for value in fn.__globals__.values() if value is tl or value is tl.core)
        if visible not in changes:
            scope = patch(fn)
            changes[visible] = [(where, name, old, getattr(where, name)) for where, name, old in scope._changes]
            return scope
        scope = interpreter._LangPatchScope()
        for where, name, old, new in changes[visible]:
            scope._changes.append((where, name, old))
            setattr(where, name, new)
        return scope

    def known_type(kind: Any) -> np.dtype[Any]:
        if kind.name not in types:
            types[kind.name] = find_type(kind)
        return types[kind.name]

    def known_block(kind: Any, shape: Any) -> Any:
        key = kind.name, *shape
        if key not in blocks:
            blocks[key] = tl.block_type(kind, shape)
        return blocks[key]

    def begin(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        if not kind.is_block():
            self.numel, self.shape = scalar
            return
        key = tuple(kind.shape)
        if key not in shapes:
            shapes[key] = tl.constexpr(math.prod(key)), tl.tuple([tl.constexpr(size) for size in key])
        self.numel, self.shape = shapes[key]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_again, known_type
    interpreter.InterpreterBuilder.get_block_ty = lambda self, kind, shape: known_block(kind, shape)
    tl.block_type.with_element_ty = lambda self, kind: known_block(kind, self.shape)
    tl.tensor.__init__ = begin
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


if DEVICE.type == "cpu":
    _mend_interpreter()
    _remember()
