"""What may come in: the checks of a new request, the bounds on what waits, and the making of its sequences."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container
from math import isfinite
from typing import Final

import numpy as np

from treadle.errors import InvalidParameter, InvalidRequest, Overloaded, PromptTooLong
from treadle.transport.codec import UInt32, pack, unpack, unpack_unsigned
from treadle.transport.messages import SamplingParams, Submit

from .config import CoreConfig
from .policies.interface import LEAST_OUTPUT, Ticket
from .rates import Rate
from .request import Request, Sequence, derive_seed
from .waiting import Load, Waiting

MAX_PRIORITY: Final = 1 << 20
_MOST_TENANTS: Final = 1024


class Admission:
    """Numbers arrivals, and refuses what is over the bounds: of everybody together, and of each tenant."""

    def __init__(self, config: CoreConfig, draw_seed: Callable[[], int]) -> None:
        self._config = config
        self._draw_seed = draw_seed
        self._eos = frozenset(token for token in config.eos_token_ids if 0 <= token < config.vocab_size)
        self._capacity = config.capacity
        self._arrivals = 0
        self._rate = Rate()
        self._rates: OrderedDict[str, Rate] = OrderedDict()
        self._by_tenant = config.max_tenant_requests is not None or config.max_tenant_tokens is not None
        self.refused = 0

    def accept(self, submit: Submit, now: float, waiting: Waiting, in_use: Container[str], room: int | None) -> Request:
        """The request with its sequences; raises InvalidRequest and its kinds, or Overloaded.

        room: rows that whoever waits will get in the next step; None: no bound counts.
        """
        try:
            length = self._check(submit, in_use)
            if room is not None:
                self._check_load(submit, length, now, waiting, room)
        except (InvalidRequest, Overloaded):
            self.refused += 1
            raise
        return self._make(submit, length, now)

    def note_end(self, request: Request, now: float) -> None:
        """A sequence has ended; the rate of these is what a retry-after estimate goes by."""
        self._rate.note(now, request.prompt_len)
        if self._by_tenant:
            rate = self._rates.setdefault(request.tenant, Rate())
            self._rates.move_to_end(request.tenant)
            rate.note(now, request.prompt_len)
            if len(self._rates) > _MOST_TENANTS:
                self._rates.popitem(last=False)

    def _check(self, submit: Submit, in_use: Container[str]) -> int:
        ids, params, config = unpack_unsigned(submit.tokens), submit.params, self._config
        length = ids.size
        if submit.id in in_use:
            raise InvalidRequest(f"a request with the id {submit.id!r} is running; ids must be unique")
        if not length:
            raise InvalidRequest("the prompt is empty; it must have at least one token")
        if length >= self._capacity:
            raise PromptTooLong(
                f"the prompt has {length} tokens; at most {self._capacity - 1} are allowed, "
                f"so that one token of output fits into {self._capacity}"
            )
        if ids.item(ids.argmax()) >= config.vocab_size:  # three times as fast as max()
            where = int(np.argmax(ids >= config.vocab_size))
            token = unpack(submit.tokens)[where]
            raise InvalidRequest(f"prompt token {token} at position {where}: ids must be in [0, {config.vocab_size})")
        for output in submit.outputs:
            self._check_output(unpack_unsigned(output), length, params)
        if params.n < 1:
            raise InvalidParameter(f"n={params.n}: it must be at least 1")
        if not abs(submit.priority) <= MAX_PRIORITY:
            raise InvalidParameter(f"priority={submit.priority}: it must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
        if not submit.timeout >= 0:
            raise InvalidParameter(f"timeout={submit.timeout}: it must be a number of seconds, 0 for none")
        return length

    def _check_output(self, output: UInt32, prompt_len: int, params: SamplingParams) -> None:
        """What a client has already, from before a server was lost."""
        if output.size and output.max() >= self._config.vocab_size:
            raise InvalidRequest(f"outputs: ids must be in [0, {self._config.vocab_size})")
        most = self._limit(prompt_len, params) - prompt_len
        if output.size > most:
            raise InvalidRequest(f"outputs: {output.size} tokens where at most {most} can be")

    def _limit(self, length: int, params: SamplingParams) -> int:
        room = self._capacity - length
        return length + (room if params.max_tokens is None else min(params.max_tokens, room))

    def _check_load(self, submit: Submit, length: int, now: float, waiting: Waiting, room: int) -> None:
        """A request is taken when nothing waits, whatever its size; else it must fit under both bounds.

        Where nobody may wait, it is taken when there is room for it, and as many with it as there is room for.
        Under bounds in requests those do not count for whom a row is free now; under bounds in tokens they do. Whoever
        comes later may go first and take these rows.
        """
        config, count, waits = self._config, submit.params.n, waiting.count
        if not waits and (room or config.max_waiting_requests):
            return
        most, most_tokens, tokens = config.max_waiting_requests, config.max_waiting_tokens, count * length
        if waits + count > most + room or waiting.tokens + tokens > most_tokens:
            everybody = Load(waits, waiting.tokens)
            self._check_bounds("", everybody, Load(count, tokens), most, most_tokens, room, self._rate, now)
        own = waiting.tenants.get(submit.tenant) if self._by_tenant else None
        if own is not None:
            whose, rate = f" of tenant {submit.tenant!r}", self._rates.get(submit.tenant, self._rate)
            own_most, own_tokens = config.max_tenant_requests, config.max_tenant_tokens
            left = max(0, room - (waits - own.requests))  # whoever else waits may get the others
            self._check_bounds(whose, own, Load(count, tokens), own_most, own_tokens, left, rate, now)

    def _check_bounds(
        self,
        whose: str,
        load: Load,
        more: Load,
        most: int | None,
        most_tokens: int | None,
        room: int,
        rate: Rate,
        now: float,
    ) -> None:
        """Raises Overloaded; None is no bound. room: rows for these; whoever gets one does not count under `most`."""
        requests = 0 if most is None else load.requests + more.requests - most - room
        tokens = 0 if most_tokens is None else load.tokens + more.tokens - most_tokens
        if requests <= 0 and tokens <= 0:
            return
        retry_after = rate.seconds(requests, tokens, now)
        counts = room > 0 and most is not None
        rows = f" (rows for them: {room})" if counts else ""
        over = " over these rows" if counts else ""
        allowed = [f"{most} requests{over}"] * (most is not None)
        allowed += [f"{most_tokens} tokens"] * (most_tokens is not None)
        raise Overloaded(
            f"{load.requests} requests{whose} with {load.tokens} tokens are waiting{rows}; at most "
            f"{' and '.join(allowed)} are allowed; try again in {retry_after:.2f} s",
            retry_after,
            bound="tenant" if whose else "queue",
        )

    def _make(self, submit: Submit, length: int, now: float) -> Request:
        params, count = submit.params, submit.params.n
        stop_ids = self._stop_ids(params)
        request = Request(
            submit.id,
            params,
            submit.cache_salt,
            length,
            self._limit(length, params),
            length + params.min_tokens,
            stop_ids,
            pack(sorted(stop_ids)) if params.min_tokens > 0 else b"",
            now + submit.timeout if submit.timeout and isfinite(submit.timeout) else None,
            submit.tenant,
        )
        seed = self._draw_seed() if params.seed is None else params.seed
        for index in range(count):
            ticket = self._ticket(request, submit, index, now)
            sequence = Sequence(request, index, derive_seed(seed, index), submit.tokens, ticket)
            request.sequences.append(sequence)
        if submit.outputs or submit.ended:
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

    def _ticket(self, request: Request, submit: Submit, index: int, now: float) -> Ticket:
        self._arrivals += 1
        most = request.limit - request.prompt_len
        surely = most if not request.stop_ids else max(LEAST_OUTPUT, submit.params.min_tokens)
        return Ticket(
            number=self._arrivals,
            request_id=request.id,
            index=index,
            tenant=submit.tenant,
            priority=submit.priority,
            arrival=now,
            deadline=request.deadline,
            prompt_tokens=request.prompt_len,
            least_tokens=min(surely, most),
            most_tokens=most,
        )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end the output. One outside the vocabulary cannot be sampled and so ends nothing."""
        usual: frozenset[int] = frozenset() if params.ignore_eos else self._eos
        if not params.stop_token_ids:
            return usual  # one set for all, which matters when 100,000 requests wait
        return usual.union(token for token in params.stop_token_ids if 0 <= token < self._config.vocab_size)
