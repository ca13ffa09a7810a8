"""From a rank's slice of the logits to the next tokens, the same on every rank.

Rows that are greedy, or draw without filters, need one exchange of a (score, id) pair for each rank. Rows with top-k,
top-p or min-p exchange their best candidates: as many as top-k asks for, or a few hundred, then more where these did
not hold enough of the mass. See docs/sampling.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.comm import Communicator
from treadle.errors import Unsatisfiable
from treadle.transport.messages import RowFault, TokenLogprobs

from .filters import PAD, UNITS, Filters, decode, keep_mask
from .local import LocalOps, TorchOps
from .local_cpu import CpuOps
from .logprobs import LogprobBlock, logprob_block
from .masks import LocalMasks, mask_logits
from .noise import fold, gumbel, hash_ids, noise_keys
from .penalties import LogitEditor
from .state import EDITED, FILTERED, LOGPROBS, RANDOM, SamplingState
from .upload import upload, upload_column

Int64 = npt.NDArray[np.int64]
HostArray: TypeAlias = torch.Tensor | Int64 | Sequence[int]

_FIRST_TIER = 256
_GROWTH = 4
_DAMAGED = "the model file is damaged, or its numbers overflow in this dtype (float16 does easily; try float32)"
_NOTHING_LEFT = (
    "no token is allowed: the grammar, allowed and banned ids, biases and min_tokens leave none of the vocabulary"
)


@dataclass(frozen=True)
class SampleOutput:
    """tokens: int64 [S] on the device; 0 where the row is at fault.

    peaks: float64 [S], the score of each row's choice; not finite where the row is at fault. `faults` and `logprobs`
    read the device when they are asked for.
    """

    tokens: torch.Tensor
    peaks: torch.Tensor
    rows: Int64
    positions: Int64
    scored: Int64
    counts: Int64
    block: LogprobBlock | None

    @property
    def faults(self) -> list[RowFault]:
        return row_faults(self.rows, self.peaks.cpu().numpy())

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of the rows that asked and are not at fault."""
        if self.block is None:
            return []
        found = self.block.to_list(self.rows[self.scored], self.positions[self.scored], self.counts)
        good = self.peaks.isfinite().tolist()
        return [item for place, item in zip(self.scored, found, strict=True) if good[place]]


class Sampler:
    """One rank's half of sampling. All ranks call with the same rows and positions, each with its slice of the logits.

    vocab_start, vocab_local: the slice; slices are contiguous, cover vocab_size, and may be unequal or empty.
    """

    def __init__(
        self,
        comm: Communicator,
        vocab_start: int,
        vocab_local: int,
        vocab_size: int,
        state: SamplingState,
        device: torch.device | str,
    ) -> None:
        self._comm = comm
        self._start = vocab_start
        self._local = vocab_local
        self._vocab = vocab_size
        self._state = state
        self._device = torch.device(device)
        self._host = self._device.type == "cpu"
        self._ops: LocalOps
        if self._host:
            self._ops = CpuOps(vocab_start, vocab_local)
        else:
            self._ops = TorchOps(vocab_start, vocab_local, self._device)
        self._editor = LogitEditor(state, vocab_start, vocab_local)
        self._slices: list[int] = []

    def sample(
        self,
        local_logits: torch.Tensor,
        rows: HostArray,
        positions: HostArray,
        tokens: torch.Tensor,
        lengths: HostArray,
        masks: LocalMasks | None = None,
    ) -> SampleOutput:
        """Chooses the token at `positions` of each row.

        local_logits: float32 [S, vocab_local], changed only where there are masks, and only by these. rows, positions,
        lengths: [S], best on the host, so that nothing waits for the device. tokens: int [max_rows, max_len], of which
        row r's first lengths tokens are known (read for penalties only). masks: of guided rows; what they forbid is
        forbidden whatever else is asked for.
        """
        rows, positions, lengths = _host(rows), _host(positions), _host(lengths)
        flags = self._state.flags[rows]
        every_flag = int(np.bitwise_or.reduce(flags))
        logits = local_logits
        if every_flag & EDITED:
            logits = self._editor.edit(local_logits, rows, positions, tokens, lengths)
        if masks is not None:
            if every_flag & LOGPROBS and logits is local_logits:
                logits = local_logits.clone()  # log-probabilities are those of the model
            mask_logits(logits, masks)
        if not every_flag & FILTERED:
            chosen = self._unfiltered(logits, np.arange(len(rows)), rows, positions)
        else:
            filtered = np.flatnonzero(flags & FILTERED)
            chosen = torch.empty((len(rows), 2), dtype=torch.float64, device=self._device)
            plain = np.flatnonzero((flags & FILTERED) == 0)
            if len(plain):
                chosen[self._to(plain)] = self._unfiltered(logits, plain, rows[plain], positions[plain])
            chosen[self._to(filtered)] = self._filtered(logits, filtered, rows[filtered], positions[filtered])
        peaks = chosen[:, 0]
        picked = torch.where(peaks.isfinite(), chosen[:, 1], 0.0).to(torch.int64)
        scored = np.flatnonzero(flags & LOGPROBS)
        counts = self._state.logprobs[rows[scored]]
        block = self._score(local_logits, scored, picked[self._to(scored)], counts) if len(scored) else None
        return SampleOutput(picked, peaks, rows, positions, scored, counts, block)

    def prompt_logprobs(
        self, local_logits: torch.Tensor, row: int, positions: HostArray, targets: HostArray
    ) -> list[TokenLogprobs]:
        """Log-probabilities of prompt tokens. local_logits: float32 [T, vocab_local]; positions, targets: [T], of the
        tokens that these logits predict."""
        positions = _host(positions)
        counts = np.full(len(positions), max(0, int(self._state.prompt_logprobs[row])), np.int64)
        wanted = self._to(_host(targets))
        block = self._score(local_logits, np.arange(len(positions)), wanted, counts)
        return block.to_list([row] * len(positions), positions, counts)

    def _unfiltered(self, logits: torch.Tensor, which: Int64, rows: Int64, positions: Int64) -> torch.Tensor:
        """float64 [s, 2], score and id: one exchange."""
        random = (self._state.flags[rows] & RANDOM) != 0
        if not random.any():
            return self._agree(self._ops.greedy(logits, which))
        drawn = self._perturbed(logits, which[random], rows[random], positions[random])
        if random.all():
            return self._agree(drawn)
        best = torch.empty((len(which), 2), dtype=torch.float64, device=self._device)
        best[self._to(np.flatnonzero(random))] = drawn
        best[self._to(np.flatnonzero(~random))] = self._ops.greedy(logits, which[~random])
        return self._agree(best)

    def _perturbed(self, logits: torch.Tensor, which: Int64, rows: Int64, positions: Int64) -> torch.Tensor:
        keys = noise_keys(self._state.seed[rows], positions)
        return self._ops.perturbed(logits, which, self._state.temperature[rows], keys)

    def _agree(self, best: torch.Tensor) -> torch.Tensor:
        """Every rank's best, float64 [s, 2], to the best of all: the exchange."""
        return self._ops.winner(self._comm.all_gather(best))

    def _filtered(self, logits: torch.Tensor, which: Int64, rows: Int64, positions: Int64) -> torch.Tensor:
        """float64 [s, 2], in rounds: each takes the rows with the smallest number of candidates still to be tried."""
        full = max(self._all_slices())
        tiers = self._tiers(rows, full)
        chosen = torch.empty((len(rows), 2), dtype=torch.float64, device=self._device)
        left = np.arange(len(rows))
        while len(left):
            tier = int(tiers[left].min())
            now = left[tiers[left] == tier]
            drawn, decided = self._filter_round(logits, which[now], rows[now], positions[now], tier)
            chosen[self._to(now)] = drawn
            # A row with top-k had enough from the start, so nobody waits for the device to say so.
            if tier < full and (self._state.top_k[rows[now]] >= self._vocab).any():
                again = now[~decided.cpu().numpy()]
                tiers[again] = min(tier * _GROWTH, full) if tier * _GROWTH * 2 < full else full
            left = left[tiers[left] > tier]
        return chosen

    def _tiers(self, rows: Int64, full: int) -> Int64:
        """How many candidates of each rank a row takes at first. Off the host all: to see whether a part is enough
        would wait for the device."""
        top_k = self._state.top_k[rows]
        first = _FIRST_TIER if self._host else full
        tiers = np.where(top_k < self._vocab, 1 << np.ceil(np.log2(np.maximum(top_k, 64))).astype(np.int64), first)
        return np.minimum(tiers, full)

    def _filter_round(
        self, logits: torch.Tensor, which: Int64, rows: Int64, positions: Int64, tier: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and id, float64 [s, 2], and which rows had candidates enough, bool [s]."""
        every = self._comm.all_gather(self._ops.candidates(logits, which, tier))
        floor = torch.full((len(rows), 1), PAD, dtype=torch.int64, device=self._device)
        for rank, size in enumerate(self._all_slices()):
            if size > tier:
                floor = torch.maximum(floor, every[rank].amin(-1, keepdim=True))
        columns = tier if any(size > tier for size in self._all_slices()) else every.shape[0] * tier
        merged = self._ops.best_first(every.transpose(0, 1).reshape(len(rows), -1))[:, :columns].contiguous()
        values, ids = decode(merged)
        peak = values[:, 0].double()
        filters = self._filters(rows)
        total = self._total(logits, which, rows, peak)
        keep, decided = keep_mask(merged, floor, total, filters)
        if self._host:  # what is kept is a prefix, often a short one; for rows not decided nothing is drawn yet
            kept = keep.sum(-1) * (decided | (tier >= max(self._all_slices())))
            width = max(1, int(kept.max()))
            values, ids, keep = values[:, :width], ids[:, :width], keep[:, :width]
        score, token = self._draw(values, ids, keep, filters.temperature, rows, positions)
        bad = ~peak.isfinite()
        return torch.stack([torch.where(bad, peak, score), token.double()], dim=1), decided | bad

    def _draw(
        self,
        values: torch.Tensor,
        ids: torch.Tensor,
        keep: torch.Tensor,
        temperature: torch.Tensor,
        rows: Int64,
        positions: Int64,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best score, float64 [s], and its id, int64 [s], among the candidates that are kept, all [s, c]."""
        keys = self._to(noise_keys(self._state.seed[rows], positions))
        noise = gumbel(hash_ids(fold(ids), keys[:, :1], keys[:, 1:]))
        scores = (values.double() / temperature + noise).masked_fill(~keep, float("-inf"))
        best = scores.amax(-1, keepdim=True)
        return best.squeeze(1), torch.where(scores == best, ids, self._vocab).amin(-1)

    def _filters(self, rows: Int64) -> Filters:
        state = self._state
        return Filters(
            temperature=self._column(state.temperature[rows]),
            top_k=self._column(state.top_k[rows]),
            top_p=self._column(state.top_p[rows]),
            min_p=self._column(state.min_p[rows]),
            has_top_k=self._column(state.top_k[rows] < self._vocab),
        )

    def _total(self, logits: torch.Tensor, which: Int64, rows: Int64, peak: torch.Tensor) -> torch.Tensor:
        """float64 [s, 1]: units of the whole vocabulary after min-p, for the rows whose top-p needs it, else 0."""
        state = self._state
        need = np.flatnonzero((state.top_p[rows] < 1) & (state.top_k[rows] >= self._vocab))
        total = torch.zeros((len(rows), 1), dtype=torch.float64, device=self._device)
        if len(need):
            index, these = self._to(need), rows[need]
            least = state.min_p[these] * UNITS
            local = self._ops.units(logits, which[need], peak[index], state.temperature[these], least)
            total[index] = self._comm.all_gather(local).sum(0).unsqueeze(1)
        return total

    def _score(self, logits: torch.Tensor, which: Int64, targets: torch.Tensor, counts: Int64) -> LogprobBlock:
        top = min(int(counts.max(initial=0)), self._vocab)
        return logprob_block(self._comm, self._ops, logits, which, targets, self._start, top)

    def _all_slices(self) -> list[int]:
        if not self._slices:
            mine = torch.tensor([self._local], dtype=torch.int64, device=self._device)
            self._slices = self._comm.all_gather(mine).flatten().tolist()
        return self._slices

    def _to(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return upload(values, self._device)

    def _column(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        return upload_column(values, self._device)


def _host(values: HostArray) -> Int64:
    if isinstance(values, torch.Tensor):
        values = values.cpu().numpy()
    return np.asarray(values).astype(np.int64, copy=False)


def row_faults(rows: Int64, peaks: npt.NDArray[np.float64]) -> list[RowFault]:
    """The rows that nothing could be chosen for, and why; peaks: of each row's choice."""
    bad = ~np.isfinite(peaks)
    if not bad.any():
        return []
    return [_fault(int(row), peak) for row, peak in zip(rows[bad], peaks[bad].tolist(), strict=True)]


def _fault(row: int, peak: float) -> RowFault:
    if np.isnan(peak):
        return RowFault(row, f"the logits of this row are not numbers (NaN): {_DAMAGED}")
    if peak > 0:
        return RowFault(row, f"the logits of this row are infinite: {_DAMAGED}")
    return RowFault(row, _NOTHING_LEFT, Unsatisfiable.code)
