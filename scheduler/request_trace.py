"""What became of one traced request, as plain tuples; whoever exports it makes spans of them, on another thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from treadle.transport.messages import Submit

MOST_SPANS = 1024


class Part(NamedTuple):
    """A stretch of a continuation's life. Times are `time.perf_counter`'s.

    name: "queue", "prefill" (one chunk of it), "decode", "preempted", "recovery" (waits for another engine group).
    tokens: that were computed; of "decode", that were generated, the one not among them that the prefill brought.
    step: of a chunk, else -1.
    """

    continuation: int
    name: str
    began: float
    ended: float
    tokens: int = 0
    step: int = -1


class End(NamedTuple):
    """How a continuation ended. scheduled, first: when it first had a row and a token; 0 for never. tokens: of output.

    cached: tokens of its prompt that were not computed.
    """

    continuation: int
    at: float
    finish: str
    scheduled: float
    first: float
    tokens: int
    cached: int


@dataclass(slots=True)
class RequestTrace:
    """submit: without its tokens. arrived: by `time.perf_counter`. open: continuations that have not ended.

    parts, ends: of all its continuations. left_out: parts that were too many.
    """

    submit: Submit
    arrived: float
    prompt_tokens: int
    open: int
    parts: list[Part] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    left_out: int = 0

    def add(self, part: Part) -> None:
        if len(self.parts) < MOST_SPANS:
            self.parts.append(part)
        else:
            self.left_out += 1


def begin_trace(submit: Submit, arrived: float, open: int) -> RequestTrace:
    """Of a request that was accepted."""
    about = msgspec.structs.replace(submit, tokens=b"", outputs=[], ended=[])
    return RequestTrace(about, arrived, len(submit.tokens) // 4, open)
