"""Host numbers to the device without waiting for it."""

from __future__ import annotations

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


def upload_column(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """[s] to [s, 1]."""
    return upload(values, device).unsqueeze(1)
