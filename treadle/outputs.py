"""What a reader of a stream gets: structs, which are made faster than classes are; one of each for every token. Names
follow vLLM's `RequestOutput` and `CompletionOutput`."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of a token under the raw logits. rank: 1 is the most likely."""

    logprob: float
    rank: int


class CompletionOutput(msgspec.Struct):
    """One continuation so far. The lists are the reader's to keep.

    `text` and `token_ids` are whole, `delta` and `delta_token_ids` new since the last read. finish_reason: None while
    it runs, then "stop", "length" or "abort". stop_reason: the stop string or the stop token that matched, None for the
    model's own end of sequence. logprobs: by position, token id to Logprob.
    """

    index: int
    text: str = ""
    token_ids: list[int] = []
    delta: str = ""
    delta_token_ids: list[int] = []
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None


class RequestOutput(msgspec.Struct):
    """A request so far. cached_tokens: prompt tokens that the prefix cache served.

    prompt_logprobs: by prompt position, None for the first. arrival_time, first_token_time: seconds of the reader's
    `time.perf_counter`; their difference is the TTFT.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    arrival_time: float = 0.0
    first_token_time: float | None = None

    @property
    def text(self) -> str:
        """Text of the first continuation."""
        return self.outputs[0].text

    @property
    def delta(self) -> str:
        """New text of the first continuation."""
        return self.outputs[0].delta

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first continuation."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def ttft(self) -> float | None:
        """Seconds from submission to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time
