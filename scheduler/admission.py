"""What may come in: the checks of a new request, the bounds on what waits, and the making of its sequences."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container
from math import isfinite

import numpy as np

from treadle.errors import InvalidParameter, InvalidRequest, Overloaded, PromptTooLong
from treadle.transport.codec import Int32, pack, unpack
from treadle.transport.messages import SamplingParams, Submit

from .config import CoreConfig
from .request import Request, Sequence, derive_seed
from .waiting import Waiting

MAX_PRIORITY = 1 << 20
_ARRIVALS = 1 << 40

_RECENT = 64
_MIN_RETRY, _MAX_RETRY, _UNKNOWN_RETRY = 0.05, 60.0, 1.0


class Admission:
    """Numbers arrivals. A lower `priority` goes first, as in vLLM; among equals the one that came first."""

    def __init__(self, config: CoreConfig, draw_seed: Callable[[], int]) -> None:
        self._config = config
        self._draw_seed = draw_seed
        self._eos = frozenset(config.eos_token_ids)
        self._arrivals = 0
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self.refused = 0

    def accept(self, submit: Submit, now: float, waiting: Waiting, in_use: Container[str]) -> Request:
        """The request with its sequences; raises InvalidRequest and its kinds, or Overloaded."""
        try:
            length = self._check(submit, in_use)
            self._check_load(submit.params.n, length, now, waiting)
        except (InvalidRequest, Overloaded):
            self.refused += 1
            raise
        return self._make(submit, length, now)

    def note_end(self, now: float) -> None:
        """A sequence has ended; the rate of these is what a retry-after estimate goes by."""
        self._ends.append(now)

    def _check(self, submit: Submit, in_use: Container[str]) -> int:
        tokens, config = unpack(submit.tokens), self._config
        if submit.id in in_use:
            raise InvalidRequest(f"a request with the id {submit.id!r} is running; ids must be unique")
        if not tokens.size:
            raise InvalidRequest("the prompt is empty; it must have at least one token")
        if tokens.size >= config.capacity:
            raise PromptTooLong(
                f"the prompt has {tokens.size} tokens; at most {config.capacity - 1} are allowed, "
                f"so that one token of output fits into {config.capacity}"
            )
        if tokens.view(np.uint32).max() >= config.vocab_size:  # a negative id is a very great unsigned one
            where = int(np.argmax(tokens.view(np.uint32) >= config.vocab_size))
            raise InvalidRequest(
                f"prompt token {int(tokens[where])} at position {where}: ids must be in [0, {config.vocab_size})"
            )
        for output in submit.outputs:
            self._check_output(unpack(output), tokens.size, submit.params)
        if submit.params.n < 1:
            raise InvalidParameter(f"n={submit.params.n}: it must be at least 1")
        if not abs(submit.priority) <= MAX_PRIORITY:
            raise InvalidParameter(f"priority={submit.priority}: it must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
        if not submit.timeout >= 0:
            raise InvalidParameter(f"timeout={submit.timeout}: it must be a number of seconds, 0 for none")
        return tokens.size

    def _check_output(self, output: Int32, prompt_len: int, params: SamplingParams) -> None:
        """What a client has already, from before a server was lost."""
        if output.size and output.view(np.uint32).max() >= self._config.vocab_size:
            raise InvalidRequest(f"outputs: ids must be in [0, {self._config.vocab_size})")
        most = self._limit(prompt_len, params) - prompt_len
        if output.size > most:
            raise InvalidRequest(f"outputs: {output.size} tokens where at most {most} can be")

    def _limit(self, length: int, params: SamplingParams) -> int:
        room = self._config.capacity - length
        return length + (room if params.max_tokens is None else min(params.max_tokens, room))

    def _check_load(self, count: int, length: int, now: float, waiting: Waiting) -> None:
        """A request is taken when nothing waits, whatever its size; else it must fit under both bounds."""
        requests = len(waiting) + count - self._config.max_waiting_requests
        tokens = waiting.tokens + count * length - self._config.max_waiting_tokens
        if len(waiting) and (requests > 0 or tokens > 0):
            retry_after = self._retry_after(max(1, requests), now)
            raise Overloaded(
                f"{len(waiting)} requests with {waiting.tokens} tokens are waiting; at most "
                f"{self._config.max_waiting_requests} and {self._config.max_waiting_tokens} are allowed; "
                f"try again in {retry_after:.2f} s",
                retry_after,
            )

    def _retry_after(self, places: int, now: float) -> float:
        """Seconds until so many have ended, at the rate of the last few."""
        if len(self._ends) < 2 or now <= self._ends[0]:
            return _UNKNOWN_RETRY
        seconds = places * (now - self._ends[0]) / len(self._ends)
        return min(max(seconds, _MIN_RETRY), _MAX_RETRY)

    def _make(self, submit: Submit, length: int, now: float) -> Request:
        params = submit.params
        stop_ids = self._stop_ids(params)
        request = Request(
            id=submit.id,
            params=params,
            salt=submit.cache_salt,
            prompt_len=length,
            limit=self._limit(length, params),
            floor=length + params.min_tokens,
            stop_ids=stop_ids,
            ban=pack(sorted(stop_ids)) if params.min_tokens > 0 else b"",
            deadline=now + submit.timeout if submit.timeout and isfinite(submit.timeout) else None,
            unfinished=params.n,
        )
        seed = self._draw_seed() if params.seed is None else params.seed
        first = submit.priority * _ARRIVALS + self._arrivals
        self._arrivals += params.n
        request.sequences = [
            Sequence(request, index, derive_seed(seed, index), first + index, submit.tokens)
            for index in range(params.n)
        ]
        self._resume(request, submit)
        return request

    @staticmethod
    def _resume(request: Request, submit: Submit) -> None:
        """What another server has brought of it counts as if this one had: it is prefilled, and not sent again."""
        for sequence, output in zip(request.sequences, submit.outputs, strict=False):
            sequence.tokens += output
            if output:
                sequence.prompt_logprobs_to = request.prompt_len - 1
        for sequence in request.sequences:
            if sequence.index in submit.ended or len(sequence.tokens) // 4 >= request.limit:
                sequence.tokens, sequence.finish = b"", "length"
                request.unfinished -= 1

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end the output. One outside the vocabulary cannot be sampled and so ends nothing."""
        wanted = set(params.stop_token_ids) if params.ignore_eos else self._eos.union(params.stop_token_ids)
        return frozenset(token for token in wanted if 0 <= token < self._config.vocab_size)
