"""Changes to the logits before anything is chosen: bias, allowed and banned ids, minimum length, penalties.

All of it is elementwise on a rank's own slice of the vocabulary, so it needs no communication.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .state import EDITED, LISTS, MIN_TOKENS, PENALTIES, SamplingState, TokenLists

Int64 = npt.NDArray[np.int64]
_NEVER = float("-inf")


class LogitEditor:
    """Edits one rank's logits, float32 [S, vocab_local], whose columns are token ids from vocab_start on."""

    def __init__(self, state: SamplingState, vocab_start: int, vocab_local: int) -> None:
        self._state = state
        self._start = vocab_start
        self._local = vocab_local

    def edit(
        self, logits: torch.Tensor, rows: Int64, positions: Int64, tokens: torch.Tensor, lengths: Int64
    ) -> torch.Tensor:
        """The logits to choose from: the argument itself where no row needs an edit, else a changed copy.

        rows, positions, lengths: [S] on the host. tokens: [max_rows, max_len], the first lengths[i] of row i known.
        """
        flags = self._state.flags[rows] & EDITED
        written = positions - self._state.prompt_len[rows]
        short = written < self._state.min_tokens[rows]
        flags = np.where(short, flags, flags & ~MIN_TOKENS)
        if not flags.any():
            return logits
        edited = logits.clone()
        for index in np.flatnonzero(flags & (LISTS | MIN_TOKENS)):
            lists = self._state.lists[int(rows[index])]
            self._apply_lists(edited[index], lists, bool(flags[index] & MIN_TOKENS))
        punished = np.flatnonzero(flags & PENALTIES)
        if len(punished):
            self._punish(edited, punished, rows, tokens, lengths)
        return edited

    def _apply_lists(self, logits: torch.Tensor, lists: TokenLists, too_short: bool) -> None:
        if lists.bias_ids is not None and lists.bias is not None:
            mine = self._mine(lists.bias_ids)
            ids = self._to(lists.bias_ids[mine] - self._start, logits.device)
            logits.index_add_(0, ids, torch.from_numpy(lists.bias[mine]).to(logits.device))
        if lists.allowed is not None:
            ids = self._columns(lists.allowed, logits.device)
            kept = logits[ids]
            logits.fill_(_NEVER)
            logits[ids] = kept
        if lists.banned is not None:
            logits[self._columns(lists.banned, logits.device)] = _NEVER
        if too_short:
            logits[self._columns(lists.stop_ids, logits.device)] = _NEVER

    def _punish(self, logits: torch.Tensor, which: Int64, rows: Int64, tokens: torch.Tensor, lengths: Int64) -> None:
        """Repetition over prompt and output (Keskar et al. 2019, CTRL), then frequency and presence over the output."""
        state, device, chosen = self._state, logits.device, rows[which]
        longest = int(lengths[which].max())
        history = tokens[self._to(chosen, tokens.device), :longest].to(device, torch.int64) - self._start
        place = torch.arange(longest, device=device)
        mine = (history >= 0) & (history < self._local) & (place < _column(lengths[which], device))
        # What is not of this slice, or not known yet, falls into an extra column that is cut off.
        history = history.masked_fill(~mine, self._local)
        output = (mine & (place >= _column(state.prompt_len[chosen], device))).float()
        width = (len(which), self._local + 1)
        seen = torch.zeros(width, device=device).scatter_(1, history, 1.0)[:, : self._local]
        count = torch.zeros(width, device=device).scatter_add_(1, history, output)[:, : self._local]

        index = self._to(which, device)
        part = logits[index]
        repetition = _column(state.repetition[chosen], device)
        part = torch.where(seen > 0, torch.where(part > 0, part / repetition, part * repetition), part)
        part -= _column(state.frequency[chosen], device) * count
        part -= _column(state.presence[chosen], device) * (count > 0)
        logits[index] = part

    def _mine(self, ids: Int64) -> npt.NDArray[np.bool_]:
        return (ids >= self._start) & (ids < self._start + self._local)

    def _columns(self, ids: Int64, device: torch.device) -> torch.Tensor:
        return self._to(ids[self._mine(ids)] - self._start, device)

    @staticmethod
    def _to(values: Int64, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(values).to(device)


def _column(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device).unsqueeze(1)
