"""Memory through which the words of masks pass from a scheduler to its ranks, all of one machine.

The masks of a step are on its critical path, and 4 MB for 256 rows of 128,000 tokens. Found, named, sent and put in
their places again they took 2 ms; where they lie here, what makes them writes them and a device reads them.

A step's masks lie in the slot of its number, modulo the slots. There are as many of these as steps may be in flight, so
when a step is on its way all ranks have answered to the one that had its slot before. The memory is a file without a
name: it is gone with the last process that has it, and takes no room before its first use.
"""

from __future__ import annotations

import mmap
import os
import sys

import numpy as np
import numpy.typing as npt


def can_share() -> bool:
    """Whether this system has such memory, and lets us have some: a sandbox may not."""
    if sys.platform != "linux":
        return False
    try:
        os.close(os.memfd_create("treadle-masks"))
    except (OSError, AttributeError):  # some builds of Python have none
        return False
    return True


class MaskPages:
    """descriptor: of the file, which is not needed any more. slots, rows, width: masks of so many steps, for each so
    many rows, of so many words. whole: uint32 [slots, rows, width]. Raises OSError, ValueError for a file too small."""

    def __init__(self, descriptor: int, slots: int, rows: int, width: int) -> None:
        self.slots = slots
        self.rows = rows
        self.width = width
        if descriptor < 0:
            raise ValueError("no descriptor: mmap would give memory of its own")
        memory = mmap.mmap(descriptor, _bytes(slots, rows, width))
        self.whole: npt.NDArray[np.uint32] = np.frombuffer(memory, np.uint32).reshape(slots, rows, width)

    def words(self, step: int, rows: int) -> npt.NDArray[np.uint32]:
        """uint32 [rows, width] of this step, of any values at first."""
        return self.whole[step % self.slots, :rows]


def make_pages(slots: int, rows: int, width: int) -> tuple[int, MaskPages]:
    """A new file's descriptor, to be closed by the caller, and its pages. Raises OSError."""
    descriptor = os.memfd_create("treadle-masks", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, _bytes(slots, rows, width))
        return descriptor, MaskPages(descriptor, slots, rows, width)
    except BaseException:
        os.close(descriptor)
        raise


def _bytes(slots: int, rows: int, width: int) -> int:
    return slots * rows * width * 4
