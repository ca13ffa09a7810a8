"""What makes numpy quick with small arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def constant(value: bool | float) -> npt.NDArray[Any]:
    """An array that cannot be changed. numpy makes one of every number that it is given, which takes longer than adding
    it to a few others."""
    array = np.array(value)
    array.setflags(write=False)
    return array


NO, YES = constant(False), constant(True)


def all_of(flags: npt.NDArray[np.bool_]) -> bool:
    """Whether all are set. Many times as fast as `flags.all()` where arrays are small."""
    return b"\0" not in flags.tobytes()


def any_of(flags: npt.NDArray[np.bool_]) -> bool:
    """Whether one is set, as `flags.any()`."""
    return b"\1" in flags.tobytes()
