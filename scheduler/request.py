"""Requests, their sequences, and what comes out of them."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Final

import msgspec

from treadle.transport.codec import unpack
from treadle.transport.messages import Row, SamplingParams, TokenLogprobs

from .policies.interface import Ticket

NO_ROW: Final = Row(-1)
_MASK: Final = (1 << 64) - 1


def derive_seed(seed: int, index: int) -> int:
    """Seed of continuation `index`, unsigned 64 bit. Continuation 0 has the request's own, so n=1 equals its first.

    The others are outputs of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    if index == 0:
        return seed & _MASK
    value = (seed + index * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Request:
    """One prompt and its `n` continuations.

    context: free for whoever owns the core, to route outputs without a look-up.
    deadline: absolute time, None is none. stop_ids: token ids that end a continuation, EOS among them.
    limit: tokens, prompt included, at which a continuation ends. floor: stop ids do not count below it.
    failures: engine deaths in a row that found it in flight. accused: one of them while it was on trial, so it has been
    tried alone, before its turn. running: how many of its sequences have a row.
    tenant: on whose account.
    """

    __slots__ = (
        "accused",
        "ban",
        "context",
        "deadline",
        "failures",
        "floor",
        "id",
        "limit",
        "params",
        "prompt_len",
        "running",
        "salt",
        "sequences",
        "stop_ids",
        "tenant",
        "unfinished",
    )

    def __init__(
        self,
        id: str,
        params: SamplingParams,
        salt: str,
        prompt_len: int,
        limit: int,
        floor: int,
        stop_ids: frozenset[int],
        ban: bytes,
        deadline: float | None,
        tenant: str,
    ) -> None:
        self.id = id
        self.params = params
        self.salt = salt
        self.prompt_len = prompt_len
        self.limit = limit
        self.floor = floor
        self.stop_ids = stop_ids
        self.ban = ban
        self.deadline = deadline
        self.context: object = None
        self.sequences: list[Sequence] = []
        self.unfinished = params.n
        self.running = 0
        self.failures = 0
        self.accused = False
        self.tenant = tenant

    @property
    def guided(self) -> bool:
        """Its samples wait for masks."""
        return self.params.guided is not None

    @property
    def engine_params(self) -> SamplingParams:
        """What ranks are told: they get masks, and need no grammar."""
        return msgspec.structs.replace(self.params, guided=None) if self.guided else self.params


class Sequence:
    """One continuation. It waits, or runs (has a row), or has ended (`finish` says why).

    order: number of its arrival. ticket: what policies see of it. lane, key: its place in the policy's order, once
    `placed`. latest: when it is too late for it to begin.
    tokens: int32 bytes, prompt and committed output; while it runs, as they were when it started.
    admission: number of its latest admission.
    in_flight: tokens of that admission that are still to come back after it was preempted.
    cached_tokens: prompt tokens served from the prefix cache at the first admission, -1 before.
    prompt_logprobs_to: prompt positions up to here have been delivered.
    wanted: free blocks that it asked for when last tried in vain, so that it is not looked up again at every step.
    """

    __slots__ = (
        "admission",
        "cached_tokens",
        "finish",
        "in_flight",
        "index",
        "key",
        "lane",
        "latest",
        "order",
        "placed",
        "prompt_logprobs_to",
        "request",
        "row",
        "seed",
        "ticket",
        "tokens",
        "wanted",
    )

    def __init__(self, request: Request, index: int, seed: int, tokens: bytes, ticket: Ticket) -> None:
        self.request = request
        self.index = index
        self.seed = seed
        self.order = ticket.number
        self.tokens = tokens
        self.ticket = ticket
        self.lane = ""
        self.key = 0.0
        self.placed = False
        self.latest = inf
        self.row = NO_ROW
        self.admission = 0
        self.in_flight = 0
        self.cached_tokens = -1
        self.prompt_logprobs_to = 0
        self.wanted = 0
        self.finish = ""

    @property
    def known(self) -> int:
        """Committed tokens; only while it has no row."""
        return len(self.tokens) // 4


class Output:
    """What a step brought to one sequence beyond a plain token. The fields are those of the wire's `Delta`.

    known: how many tokens it came to, prompt included, when it ended; 0 before.
    """

    __slots__ = (
        "error",
        "error_code",
        "finish",
        "known",
        "logprobs",
        "prompt_logprobs",
        "sequence",
        "stop_token",
        "tokens",
    )

    def __init__(self, sequence: Sequence, *tokens: int, error_code: str = "", error: str = "") -> None:
        self.sequence = sequence
        self.tokens = [*tokens]
        self.finish = ""
        self.stop_token = -1
        self.error_code = error_code
        self.error = error
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.known = 0

    @property
    def length(self) -> int:
        """Tokens of output in all, once it has ended."""
        return self.known - self.sequence.request.prompt_len

    @property
    def cached_tokens(self) -> int:
        return max(0, self.sequence.cached_tokens)


class Outputs:
    """What a step brought to everybody: a sequence appears once, in one of the two forms.

    sequences, tokens: parallel; each got this one token and goes on. This is the bulk, so it has no objects. packed:
    the tokens as int32 bytes, as the result had them; `tokens` makes them anew each time that it is asked.
    others: those that ended, or carry log-probabilities, or both.
    """

    __slots__ = ("others", "packed", "sequences")

    def __init__(self, others: list[Output]) -> None:
        self.sequences: list[Sequence] = []
        self.packed = b""
        self.others = others

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = unpack(self.packed).tolist()
        return tokens

    @property
    def finished(self) -> list[Output]:
        return [output for output in self.others if output.finish]

    def each(self) -> Iterator[Output]:
        """Everything in the long form, for callers that do not mind an object per token."""
        yield from (Output(sequence, token) for sequence, token in zip(self.sequences, self.tokens, strict=True))
        yield from self.others
