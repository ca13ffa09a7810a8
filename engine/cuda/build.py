"""Puts the GPU's runner together: rows, kernels, sampler, graphs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from treadle.engine.comm import Communicator
from treadle.engine.kv import KVCache
from treadle.engine.model import Decoder
from treadle.engine.rows import RowMirror
from treadle.engine.sampling.sampler import Sampler
from treadle.engine.sampling.state import SamplingState
from treadle.engine.swap import BlockCopies
from treadle.transport.messages import Configure

from .device_rows import DeviceRows
from .graphs import Graphs
from .memory import largest_step
from .program import FusedSampler, StepProgram
from .row_ops import RowOps, TorchRowOps
from .runner import CudaRunner


def make_program(
    configure: Configure,
    model: Decoder,
    comm: Communicator,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: bool,
) -> StepProgram:
    """Everything of a step but the KV cache. kernels: Triton's; without them it needs a CPU."""
    ops: RowOps = TorchRowOps()
    if kernels:
        from treadle.engine.kernels.rows import TritonRowOps

        ops = TritonRowOps()
    vocab_size = model.config.vocab_size
    rows = DeviceRows(configure.max_num_seqs, configure.max_model_len, configure.block_size, vocab_size, ops, device)
    fused: FusedSampler | None = None
    if kernels:
        from .sampling import Fused

        fused = Fused(model, rows, comm)
    return StepProgram(model, rows, fused, max_tokens=configure.max_num_batched_tokens, dtype=dtype, device=device)


@dataclass(slots=True)
class Host:
    """The host's side of the rows, and of blocks that moved there."""

    mirror: RowMirror
    sampling: SamplingState
    sampler: Sampler
    copies: BlockCopies


@torch.inference_mode()
def make_runner(
    configure: Configure, program: StepProgram, kv: KVCache, host: Host, device: torch.device, *, profiled: bool
) -> CudaRunner:
    """Captures, so that the first step is like all others. profiled: the largest step has run already."""
    program.kv = kv
    graphs = Graphs(program, configure.max_num_seqs)
    if device.type == "cuda":
        run = partial(largest_step, program, lambda _: kv, configure.max_num_batched_tokens, configure.max_model_len)
        if configure.cuda_graphs and program.model.graphs:
            graphs.capture(configure.max_model_len)
        if not profiled:
            run()  # fills the allocator's cache, so that no later step has to ask the driver for memory
        torch.cuda.synchronize(device)
    return CudaRunner(program, graphs, host.mirror, host.sampling, host.sampler, device, host.copies)
