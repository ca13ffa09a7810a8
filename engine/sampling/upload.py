"""Host numbers to the device without waiting for it."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt
import torch


def upload(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The same numbers on the device; on the CPU the same memory.

    A copy from ordinary memory to a GPU waits until all work queued there is done. From pinned memory it queues up.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def pin(values: npt.NDArray[np.generic]) -> bool:
    """Has the memory of these kept where it is, so that a GPU reads it itself, for as long as this process lives. False
    where the driver refuses: then `upload_pinned` copies it once more."""
    done: object = torch.cuda.cudart().cudaHostRegister(values.ctypes.data, values.nbytes, 0)
    if int(done) == 0:  # type: ignore[call-overload]
        return True
    with suppress(RuntimeError):  # the runtime keeps the error, and the next launch would take it for its own
        torch.zeros(1, device="cuda").add_(1)
    return False


def upload_pinned(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """`upload` out of memory that was pinned and stays as it is until the copy is done. Other memory is copied."""
    tensor = torch.from_numpy(values)
    if device.type == "cpu":
        return tensor
    return tensor.to(device, non_blocking=True) if tensor.is_pinned() else upload(values, device)


def upload_column(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """[s] to [s, 1]."""
    return upload(values, device).unsqueeze(1)
