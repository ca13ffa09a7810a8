"""Changes to the logits before anything is chosen: bias, allowed and banned ids, minimum length, penalties.

All of it is elementwise on a rank's own slice of the vocabulary, so it needs no communication.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from .state import EDITED, LISTS, MIN_TOKENS, PENALTIES, SamplingState, TokenLists
from .upload import upload, upload_column

Int64 = npt.NDArray[np.int64]
_NEVER = float("-inf")
_CHUNK = 32
"""Rows whose penalties are computed at once: bounds the memory of the counts."""


class LogitEditor:
    """Edits one rank's logits, float32 [S, vocab_local], whose columns are token ids from vocab_start on."""

    def __init__(self, state: SamplingState, vocab_start: int, vocab_local: int) -> None:
        self._state = state
        self._start = vocab_start
        self._local = vocab_local
        self._spare = torch.empty((0, vocab_local + 1))
        self._counts = torch.empty((0, vocab_local + 1))

    def edit(
        self, logits: torch.Tensor, rows: Int64, positions: Int64, tokens: torch.Tensor, lengths: Int64
    ) -> torch.Tensor:
        """The logits to choose from: the argument itself where no row needs an edit, else a changed copy, which lasts
        until the next call.

        rows, positions, lengths: [S] on the host. tokens: [max_rows, max_len], the first lengths[i] of row i known.
        """
        flags = self._state.flags[rows] & EDITED
        written = positions - self._state.prompt_len[rows]
        short = written < self._state.min_tokens[rows]
        flags = np.where(short, flags, flags & ~MIN_TOKENS)
        if not flags.any():
            return logits
        # One more column than the slice, for what falls outside of it. The memory is kept: fresh pages cost more than
        # the copy does.
        self._spare = _at_least(self._spare, len(rows), logits.device)
        padded = self._spare[: len(rows)]
        edited = padded[:, : self._local]
        edited.copy_(logits)
        for index in np.flatnonzero(flags & (LISTS | MIN_TOKENS)):
            lists = self._state.lists[int(rows[index])]
            self._apply_lists(edited[index], lists, bool(flags[index] & MIN_TOKENS))
        punished = np.flatnonzero(flags & PENALTIES)
        for first in range(0, len(punished), _CHUNK):
            self._punish(padded, punished[first : first + _CHUNK], rows, tokens, lengths)
        return edited

    def _apply_lists(self, logits: torch.Tensor, lists: TokenLists, too_short: bool) -> None:
        if lists.bias_ids is not None and lists.bias is not None:
            mine = self._mine(lists.bias_ids)
            ids = upload(lists.bias_ids[mine] - self._start, logits.device)
            logits.index_add_(0, ids, upload(lists.bias[mine], logits.device))
        if lists.allowed is not None:
            ids = self._columns(lists.allowed, logits.device)
            kept = logits[ids]
            logits.fill_(_NEVER)
            logits[ids] = kept
        if lists.banned is not None:
            logits[self._columns(lists.banned, logits.device)] = _NEVER
        if too_short:
            logits[self._columns(lists.stop_ids, logits.device)] = _NEVER

    def _punish(self, padded: torch.Tensor, which: Int64, rows: Int64, tokens: torch.Tensor, lengths: Int64) -> None:
        """Repetition over prompt and output (Keskar et al. 2019, CTRL), then frequency and presence over the output.

        Works on the tokens that occur, not on the vocabulary. A token that occurs twice is computed twice, from the
        same logit and count, and written twice with the same value. padded: float32 [S, vocab_local + 1].
        """
        state, device, chosen = self._state, padded.device, rows[which]
        longest = int(lengths[which].max())
        history = tokens[upload(chosen, tokens.device), :longest].to(device, torch.int64) - self._start
        place = torch.arange(longest, device=device)
        mine = (history >= 0) & (history < self._local) & (place < upload_column(lengths[which], device))
        history = history.masked_fill_(~mine, self._local)
        output = (mine & (place >= upload_column(state.prompt_len[chosen], device))).float()

        self._counts = _at_least(self._counts, len(which), device)
        counts = self._counts[: len(which)]
        count = counts.scatter_(1, history, 0.0).scatter_add_(1, history, output).gather(1, history)
        index = upload(which, device).unsqueeze(1)
        logits = padded[index, history]
        repetition = upload_column(state.repetition[chosen], device)
        logits = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits -= upload_column(state.frequency[chosen], device) * count
        logits -= upload_column(state.presence[chosen], device) * (count > 0)
        padded[index, history] = logits

    def _mine(self, ids: Int64) -> npt.NDArray[np.bool_]:
        return (ids >= self._start) & (ids < self._start + self._local)

    def _columns(self, ids: Int64, device: torch.device) -> torch.Tensor:
        return upload(ids[self._mine(ids)] - self._start, device)


def _at_least(buffer: torch.Tensor, rows: int, device: torch.device) -> torch.Tensor:
    """The buffer, or a larger one with nothing defined in it. An ordinary tensor even in inference mode, where it would
    otherwise be of no use outside."""
    if len(buffer) >= rows and buffer.device == device:
        return buffer
    with torch.inference_mode(False):
        return torch.empty((rows, buffer.shape[1]), device=device)
