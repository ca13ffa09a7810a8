"""Requests, their sequences, and what comes out of them: structs, which are made faster than classes are."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import msgspec

from treadle.transport.codec import unpack
from treadle.transport.messages import Row, SamplingParams, TokenLogprobs

from .policies.interface import Ticket

NO_ROW = Row(-1)
_MASK = (1 << 64) - 1


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


class Request(msgspec.Struct, eq=False):
    """One prompt and its `n` continuations.

    context: free for whoever owns the core, to route outputs without a look-up.
    deadline: absolute time, None is none. stop_ids: token ids that end a continuation, EOS among them.
    limit: tokens, prompt included, at which a continuation ends. floor: stop ids do not count below it.
    failures: engine deaths in a row that found it in flight. accused: one of them while it was on trial, so it has been
    tried alone, before its turn. running: how many of its sequences have a row.
    tenant: on whose account.
    """

    id: str
    params: SamplingParams
    salt: str
    prompt_len: int
    limit: int
    floor: int
    stop_ids: frozenset[int]
    ban: bytes
    deadline: float | None
    context: object = None
    sequences: list[Sequence] = []
    unfinished: int = 0
    running: int = 0
    failures: int = 0
    accused: bool = False
    tenant: str = ""

    @property
    def guided(self) -> bool:
        """Its samples wait for masks."""
        return self.params.guided is not None

    @property
    def engine_params(self) -> SamplingParams:
        """What ranks are told: they get masks, and need no grammar."""
        return msgspec.structs.replace(self.params, guided=None) if self.guided else self.params


class Sequence(msgspec.Struct, eq=False):
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

    request: Request
    index: int
    seed: int
    order: int
    tokens: bytes
    ticket: Ticket
    lane: str = ""
    key: float = 0.0
    placed: bool = False
    latest: float = inf
    row: Row = NO_ROW
    admission: int = 0
    in_flight: int = 0
    cached_tokens: int = -1
    prompt_logprobs_to: int = 0
    wanted: int = 0
    finish: str = ""

    @property
    def known(self) -> int:
        """Committed tokens; only while it has no row."""
        return len(self.tokens) // 4


class Output(msgspec.Struct, eq=False):
    """What a step brought to one sequence beyond a plain token. The fields are those of the wire's `Delta`.

    known: how many tokens it came to, prompt included, when it ended; 0 before.
    """

    sequence: Sequence
    tokens: list[int] = []
    finish: str = ""
    stop_token: int = -1
    error_code: str = ""
    error: str = ""
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    known: int = 0

    @property
    def length(self) -> int:
        """Tokens of output in all, once it has ended."""
        return self.known - self.sequence.request.prompt_len

    @property
    def cached_tokens(self) -> int:
        return max(0, self.sequence.cached_tokens)


class Outputs(msgspec.Struct, eq=False):
    """What a step brought to everybody: a sequence appears once, in one of the two forms.

    sequences, tokens: parallel; each got this one token and goes on. This is the bulk, so it has no objects. packed:
    the tokens as int32 bytes, as the result had them; `tokens` makes them anew each time that it is asked.
    others: those that ended, or carry log-probabilities, or both.
    """

    sequences: list[Sequence] = []
    packed: bytes = b""
    others: list[Output] = []

    @property
    def tokens(self) -> list[int]:
        tokens: list[int] = unpack(self.packed).tolist()
        return tokens

    @property
    def finished(self) -> list[Output]:
        return [output for output in self.others if output.finish]

    def each(self) -> Iterator[Output]:
        """Everything in the long form, for callers that do not mind an object per token."""
        yield from (Output(sequence, [token]) for sequence, token in zip(self.sequences, self.tokens, strict=True))
        yield from self.others
