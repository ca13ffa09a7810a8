"""What makes numpy quick with small arrays."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt


def constant(value: bool | float) -> npt.NDArray[Any]:
    """An array that cannot be changed. numpy makes one of every number that it is given, which takes longer than adding
    it to a few others."""
    array = np.array(value)
    array.setflags(write=False)
    return array


def numbers_of(array: npt.NDArray[np.int64] | npt.NDArray[np.intp]) -> memoryview[int]:
    """The same memory, in which one number is read and written in less than half of the time."""
    return array.data


def floats_of(array: npt.NDArray[np.float64]) -> memoryview[float]:
    """As `numbers_of`."""
    return array.data.cast("B").cast("d", array.shape)


NO: Final = constant(False)
YES: Final = constant(True)


def all_of(flags: npt.NDArray[np.bool_]) -> bool:
    """Whether all are set. Many times as fast as `flags.all()` where arrays are small."""
    return b"\0" not in flags.tobytes()


def any_of(flags: npt.NDArray[np.bool_]) -> bool:
    """Whether one is set, as `flags.any()`."""
    return b"\1" in flags.tobytes()
