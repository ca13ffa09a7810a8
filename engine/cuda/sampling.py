"""The fused sampler as a step uses it, where its kernels are there."""

from __future__ import annotations

from torch import Tensor

from treadle.engine.comm import Communicator
from treadle.engine.model import Decoder
from treadle.engine.sampling.fused import FusedWorkspace, sample_fused
from treadle.engine.sampling.masks import LocalMasks

from .device_rows import DeviceRows
from .masks import DeviceMasks


class Fused:
    """A `program.FusedSampler` with memory of its own."""

    def __init__(self, model: Decoder, rows: DeviceRows, comm: Communicator) -> None:
        self.world_size = comm.world_size
        self._params = rows.parameters
        self._comm = comm
        self._start = model.vocab_start
        self._workspace = FusedWorkspace(rows.max_rows, model.vocab_local, rows.history.device)

    def __call__(
        self, logits: Tensor, rows: Tensor, positions: Tensor, filtered: bool, comm: Communicator | None = None
    ) -> tuple[Tensor, Tensor]:
        return sample_fused(
            logits, rows, self._params, positions, comm or self._comm, self._start, self._workspace, filtered=filtered
        )

    def mask(self, logits: Tensor, masks: LocalMasks) -> None:
        if len(masks.places):
            DeviceMasks.of(masks, logits.device).apply(logits)
