"""Weights from mapped files to a GPU as fast as the disk gives them: through pinned memory, by several threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

# Reading a mapped file waits for every page that is not in memory yet: many threads have many pages on their way.
_THREADS = 8
_BUFFER = 8 << 20
Wait = Callable[[], None]


class Upload:
    """Copies to `device`, on the stream that is current where it is made. buffer: bytes that a thread takes at once.

    The copies to the device are only queued when a call returns; work on the same stream comes after them.
    """

    def __init__(self, device: torch.device, *, threads: int = _THREADS, buffer: int = _BUFFER) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._size = buffer
        self._stream = torch.cuda.current_stream(device) if cuda else None
        self._pool = ThreadPoolExecutor(threads, "upload")
        self._free: SimpleQueue[tuple[Tensor, Wait]] = SimpleQueue()
        for _ in range(2 * threads):
            self._free.put((torch.empty(buffer, dtype=torch.uint8, pin_memory=cuda), lambda: None))

    def __call__(self, part: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of `part`, on the CPU and of any strides, as a contiguous tensor of `dtype` on the device."""
        out = torch.empty(part.shape, dtype=part.dtype, device=self._device)
        if part.numel() == 0:
            return out.to(dtype)
        # Rows as wide as possible; of a slice across the rows that is a part of each.
        rows, goal = (part.view(1, -1), out.view(1, -1)) if part.is_contiguous() else (part, out)
        most = self._size // part.itemsize
        width = min(rows.shape[-1], most)
        height = max(most // width, 1)
        jobs = [
            self._pool.submit(self._copy, rows[top : top + height, left : left + width],
                              goal[top : top + height, left : left + width])
            for top in range(0, rows.shape[0], height)
            for left in range(0, rows.shape[-1], width)
        ]  # fmt: skip
        for job in jobs:
            job.result()
        return out.to(dtype)  # there, where it costs nothing

    @torch.inference_mode()
    def _copy(self, source: Tensor, goal: Tensor) -> None:
        buffer, wait = self._free.get()
        try:
            wait()  # until the copy out of it is done
            staged = buffer[: source.numel() * source.itemsize].view(source.dtype).view(source.shape)
            staged.copy_(source)
            if self._stream is None:
                goal.copy_(staged)
                return
            with torch.cuda.stream(self._stream):
                goal.copy_(staged, non_blocking=True)
                event = torch.cuda.Event(blocking=True)
                event.record()
            wait = event.synchronize
        finally:
            self._free.put((buffer, wait))
