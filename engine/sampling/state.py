"""What sampling needs to know of each row, set when the row starts: a structure of arrays on the host.

It lives on the host because it is known there: choosing the path of a step then needs no question to the device, and
the few numbers that a step's rows need travel with the launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from treadle.transport.codec import unpack
from treadle.transport.messages import RowStart, SamplingParams

RANDOM = 1
"""The row draws (temperature above zero)."""
FILTERED = 2
"""It draws under top-k, top-p or min-p."""
LISTS = 4
"""Bias, allowed or banned ids."""
PENALTIES = 8
MIN_TOKENS = 16
"""Stop ids are banned while the output is short."""
LOGPROBS = 32
EDITED = LISTS | PENALTIES | MIN_TOKENS

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenLists:
    """A row's lists of token ids, int64; None where the request has none. bias: float32, beside bias_ids."""

    bias_ids: Int64 | None
    bias: npt.NDArray[np.float32] | None
    allowed: Int64 | None
    banned: Int64 | None
    stop_ids: Int64


class SamplingState:
    """Rows' sampling parameters. Arrays are indexed by row; a row's values are meaningful between start and stop.

    device: where the logits will be; the state itself stays on the host. Raises ProtocolError from `start` when the
    stop ids are not int32 bytes; values are taken as checked (`treadle.transport.params`).
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.flags = np.zeros(max_rows, np.int64)
        self.seed = np.zeros(max_rows, np.uint64)
        self.temperature = np.ones(max_rows, np.float64)
        self.top_k = np.full(max_rows, vocab_size, np.int64)
        self.top_p = np.ones(max_rows, np.float64)
        self.min_p = np.zeros(max_rows, np.float64)
        self.repetition = np.ones(max_rows, np.float32)
        self.presence = np.zeros(max_rows, np.float32)
        self.frequency = np.zeros(max_rows, np.float32)
        self.prompt_len = np.zeros(max_rows, np.int64)
        self.min_tokens = np.zeros(max_rows, np.int64)
        self.logprobs = np.full(max_rows, -1, np.int64)
        self.prompt_logprobs = np.full(max_rows, -1, np.int64)
        self.lists: dict[int, TokenLists] = {}
        self._prompt_scored: set[int] = set()

    def start(self, row: int, start: RowStart) -> None:
        """Takes over the parameters of a row that starts, whatever the row was before."""
        self.stop(row)
        params = start.params
        self.seed[row] = np.uint64(start.seed & 0xFFFFFFFFFFFFFFFF)
        self.temperature[row] = max(params.temperature, GREEDY_BELOW)
        self.top_k[row] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.repetition[row] = params.repetition_penalty
        self.presence[row] = params.presence_penalty
        self.frequency[row] = params.frequency_penalty
        self.prompt_len[row] = start.prompt_len
        self.min_tokens[row] = params.min_tokens
        self.logprobs[row] = -1 if params.logprobs is None else params.logprobs
        if params.prompt_logprobs is not None:
            self.prompt_logprobs[row] = params.prompt_logprobs
            self._prompt_scored.add(row)
        lists = _token_lists(params, unpack(start.stop_ids).astype(np.int64))
        if lists is not None:
            self.lists[row] = lists
        self.flags[row] = self._flags(row, params, lists)

    def stop(self, row: int) -> None:
        """The row ended: nothing of it is left."""
        self.flags[row] = 0
        self.logprobs[row] = self.prompt_logprobs[row] = -1
        self.lists.pop(row, None)
        self._prompt_scored.discard(row)

    @property
    def any_prompt_logprobs(self) -> bool:
        return bool(self._prompt_scored)

    def wants_prompt_logprobs(self, row: int) -> bool:
        return row in self._prompt_scored

    def _flags(self, row: int, params: SamplingParams, lists: TokenLists | None) -> int:
        filtered = self.top_k[row] < self.vocab_size or params.top_p < 1 or params.min_p > 0
        flags = 0
        if params.temperature >= GREEDY_BELOW:
            flags |= RANDOM | (FILTERED if filtered else 0)
        if lists is not None:
            if lists.bias_ids is not None or lists.allowed is not None or lists.banned is not None:
                flags |= LISTS
            if len(lists.stop_ids) and params.min_tokens > 0:
                flags |= MIN_TOKENS
        if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
            flags |= PENALTIES
        if params.logprobs is not None:
            flags |= LOGPROBS
        return flags


def _token_lists(params: SamplingParams, stop_ids: Int64) -> TokenLists | None:
    bias = params.logit_bias or None
    unrestricted = bias is None and params.allowed_token_ids is None and params.banned_token_ids is None
    if unrestricted and not (params.min_tokens > 0 and len(stop_ids)):
        return None
    return TokenLists(
        bias_ids=np.array(list(bias), np.int64) if bias else None,
        bias=np.array(list(bias.values()), np.float32) if bias else None,
        allowed=_ids(params.allowed_token_ids),
        banned=_ids(params.banned_token_ids),
        stop_ids=stop_ids,
    )


def _ids(values: list[int] | None) -> Int64 | None:
    return None if values is None else np.unique(np.array(values, np.int64))
