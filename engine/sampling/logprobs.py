"""Log-probabilities of raw logits, with the vocabulary spread over ranks, in two small exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.comm import Communicator
from treadle.transport.messages import TokenLogprobs

from .filters import UNITS, decode
from .local import LocalOps
from .upload import upload

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LogprobBlock:
    """s positions, on the device. logprob: float64, rank: int64, [s]. top_ids, top_logprobs: int64, float32, [s, n]."""

    targets: torch.Tensor
    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def to_list(self, rows: Sequence[int] | Int64, positions: Int64, counts: Int64) -> list[TokenLogprobs]:
        """counts: how many top entries each position asked for."""
        targets, logprob, rank = self.targets.tolist(), self.logprob.tolist(), self.rank.tolist()
        ids = self.top_ids.cpu().numpy().astype("<i4")
        top = self.top_logprobs.cpu().numpy().astype("<f4")
        return [
            TokenLogprobs(
                row=int(rows[i]),
                position=int(positions[i]),
                token_id=targets[i],
                logprob=logprob[i],
                rank=rank[i],
                top_ids=ids[i, : counts[i]].tobytes(),
                top_logprobs=top[i, : counts[i]].tobytes(),
            )
            for i in range(len(targets))
        ]


def logprob_block(
    comm: Communicator,
    ops: LocalOps,
    logits: torch.Tensor,
    which: Int64,
    targets: torch.Tensor,
    vocab_start: int,
    top: int,
) -> LogprobBlock:
    """Of the rows `which` of logits, float32 [S, vocab_local], and their targets, int64 global ids [s].

    top: how many of the most likely to find, equal on all ranks. A row with a NaN gives NaN.
    The sum over the vocabulary is exact in whole units (see `filters`), so the result does not depend on its cut.
    """
    size, device = logits.shape[1], logits.device
    column = targets - vocab_start
    mine = (column >= 0) & (column < size)
    index = upload(which, device)
    if size:
        own = logits[index, column.clamp(0, size - 1)].masked_fill(~mine, float("-inf"))
    else:
        own = torch.full((len(which),), float("-inf"), device=device)
    peaks = ops.greedy(logits, which)[:, 0]
    first = comm.all_gather(torch.stack([peaks, own.double()])).amax(0)
    peak, chosen = first[0], first[1]

    ones, zeros = np.ones(len(which)), np.zeros(len(which))
    sums = ops.units(logits, which, peak, ones, zeros).nan_to_num_(nan=0.0).to(torch.int64)
    ahead = ops.at_least(logits, which, chosen.float())
    best = ops.candidates(logits, which, top)
    second = comm.all_gather(torch.cat([sums.unsqueeze(1), ahead.unsqueeze(1), best], dim=1))
    log_total = peak + torch.log(second[..., 0].sum(0).double() / UNITS)
    merged = ops.best_first(second[..., 2:].transpose(0, 1).reshape(len(which), -1))[:, :top].contiguous()
    values, ids = decode(merged)
    return LogprobBlock(
        targets=targets,
        logprob=chosen - log_total,
        rank=second[..., 1].sum(0),
        top_ids=ids,
        top_logprobs=(values.double() - log_total.unsqueeze(1)).float(),
    )
