"""Collectives between the ranks of a tensor-parallel group, behind one small interface."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from treadle.errors import EngineFailed, EngineStartFailed

from .native import Native, load_native

if TYPE_CHECKING:
    from .comm_fused import FusedSums

DEFAULT_TIMEOUT = 60.0
# Messages are passed on in pieces of this size, so that both halves of an exchange stay in the cores' caches.
_BUFFER_BYTES = 256 << 10
_JOIN_POLL = 0.001
# At most, and only while that goes well. A peer is usually microseconds behind. To sleep in the kernel costs tens,
# and on a virtual machine hundreds, for a core without work is given back to the host. Seconds.
_SPIN = 2e-3


class Communicator(Protocol):
    """Every rank calls the same functions in the same order with equal shapes and dtypes.

    A peer that does not come within the timeout raises EngineFailed, which names it where that is known.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def fused(self) -> FusedSums | None:
        """Sums with residual and norm in one launch, where there are such."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sums `x` (contiguous) over the ranks in place and returns it: the same bits on every rank."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """[world_size, *x.shape], in rank order."""
        ...

    def barrier(self) -> None: ...


class SingleComm:
    """A group of one."""

    rank = 0
    world_size = 1
    fused: FusedSums | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0)

    def barrier(self) -> None:
        return None


class TorchComm:
    """torch.distributed: NCCL between GPUs, gloo between CPUs."""

    fused: FusedSums | None = None

    def __init__(
        self, rank: int, world_size: int, device: torch.device, init_method: str, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend, init_method, timedelta(seconds=timeout), world_size=world_size, rank=rank,
                device_id=device if device.type == "cuda" else None,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise EngineStartFailed(f"rank {rank} cannot join its group at {init_method}: {error}") from error

    def all_reduce(self, x: Tensor) -> Tensor:
        try:
            dist.all_reduce(x)
        except RuntimeError as error:
            raise EngineFailed(f"rank {self.rank}: a peer was lost: {error}") from error
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype, device=x.device)
        try:
            if x.is_cuda:  # gloo has only the other one for every dtype
                dist.all_gather_into_tensor(out, x.contiguous())
            else:
                dist.all_gather(list(out.unbind(0)), x.contiguous())
        except RuntimeError as error:
            raise EngineFailed(f"rank {self.rank}: a peer was lost: {error}") from error
        return out

    def barrier(self) -> None:
        try:
            dist.barrier()
        except RuntimeError as error:
            raise EngineFailed(f"rank {self.rank}: a peer was lost: {error}") from error


class SharedMemoryComm:
    """Processes of one machine, through a file that all map and that is unlinked once they have.

    directory: private to the group (0700) and to this start of it. name: tells groups in one directory apart.
    """

    fused: FusedSums | None = None

    def __init__(
        self,
        rank: int,
        world_size: int,
        directory: Path,
        native: Native,
        name: str = "collective",
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        if world_size > native.max_ranks:
            raise EngineStartFailed(f"{world_size} ranks: shared memory serves at most {native.max_ranks}")
        self.rank = rank
        self.world_size = world_size
        self._native = native
        self._timeout = timeout
        path = directory / name
        self._mapping = _map_shared(path, native.group_bytes(world_size, _BUFFER_BYTES))
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._join(path)
        crowded = world_size > len(os.sched_getaffinity(0))
        self._group = native.group_new(
            self._address, rank, world_size, _BUFFER_BYTES, 0.0 if crowded else _SPIN, timeout
        )
        if not self._group:
            raise MemoryError("no memory for a communicator")

    def _join(self, path: Path) -> None:
        deadline = time.monotonic() + self._timeout
        here = self._native.group_join(self._address, 1)
        while here < self.world_size:
            if time.monotonic() > deadline:
                raise EngineStartFailed(
                    f"rank {self.rank} waited {self._timeout:.0f} s for its group: {here} of {self.world_size} came"
                )
            time.sleep(_JOIN_POLL)
            here = self._native.group_join(self._address, 0)
        path.unlink(missing_ok=True)

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype is torch.bfloat16 or x.dtype is torch.float32:
            code = self._native.all_reduce(self._group, x.data_ptr(), x.numel(), x.dtype is torch.bfloat16)
            if code:
                self._fail(code)
            return x
        return x.copy_(self.all_reduce(x.float()))

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty((self.world_size, *x.shape), dtype=x.dtype)
        code = self._native.all_gather(self._group, x.data_ptr(), out.data_ptr(), x.numel() * x.element_size())
        if code:
            self._fail(code)
        return out

    def barrier(self) -> None:
        code = self._native.barrier(self._group)
        if code:
            self._fail(code)

    def _fail(self, code: int) -> None:
        raise EngineFailed(f"rank {self.rank} waited {self._timeout:.0f} s for rank {-1 - code}, which did not come")


def make_comm(
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    init_method: str,
    shared_dir: Path,
    native: bool = True,
    symmetric: bool = True,
    fused: bool = True,
    side: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
) -> Communicator:
    """The fastest communicator there is for the device.

    On CPUs `native` picks shared memory in `shared_dir`, if the kernels compile here: the ranks of one group run on one
    machine, so all come to the same answer. On GPUs `symmetric` takes small messages from NCCL, and `fused`
    those sums that a norm follows; `side` lets one half of a step be summed while the other is computed. init_method:
    torch.distributed's; unique to this start of the group. Raises EngineStartFailed.
    """
    if world_size == 1:
        return SingleComm()
    library = load_native() if native and device.type == "cpu" else None
    if library is not None and world_size <= library.max_ranks:
        name = "collective-" + hashlib.sha256(init_method.encode()).hexdigest()[:16]
        return SharedMemoryComm(rank, world_size, shared_dir, library, name, timeout)
    comm = TorchComm(rank, world_size, device, init_method, timeout)
    if not symmetric:
        return comm
    from .comm_symm import accelerate

    return accelerate(comm, device, fused=fused, side=side)


def _map_shared(path: Path, size: int) -> mmap.mmap:
    """The first to come creates it; ftruncate fills it with zeros and does nothing the second time."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(descriptor, size)
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise EngineStartFailed(f"shared memory at {path}: {error}") from error
