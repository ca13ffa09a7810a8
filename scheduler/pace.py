"""Service level: how many tokens of prompts a step may take along without keeping its decodes waiting."""

from __future__ import annotations

from math import sqrt
from typing import Final

from .cost_model import CostModel, StepShape

_PLENTY: Final = 1 << 40


class Pace:
    """Sizes chunks so that a step with decode rows is predicted to stay under `target` seconds.

    After Agrawal et al.: Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve (OSDI 2024), with the
    cost of a step learned and not profiled beforehand. Without a target, in a step in which nothing decodes, and as
    long as nothing is known of costs, there is no bound: throughput.

    least: tokens that every step may take, whatever they cost. So a target that decodes alone exceed does not keep
    prompts out: one of n tokens is computed in at most n / least steps that take it along.
    """

    def __init__(self, target: float | None, costs: CostModel, least: int) -> None:
        self._target = target
        self._costs = costs
        self._least = least
        self.bounds = target is not None

    def room(self, shape: StepShape, start: int) -> int:
        """Tokens of a chunk that begins at position `start` and joins a step of this shape."""
        if self._target is None or not shape.decode_rows:
            return _PLENTY
        seconds = self._target - self._costs.predict(shape)
        return max(self._within(seconds, start), self._least - shape.prefill_tokens, 0)

    def _within(self, seconds: float, start: int) -> int:
        """The largest c with token · c + pair · (c · start + c(c + 1)/2) ≤ seconds."""
        costs = self._costs.coefficients
        if seconds <= 0 and self._costs.known:
            return 0
        linear, square = costs.prefill_token + costs.chunk_pair * (start + 0.5), costs.chunk_pair / 2
        if linear <= 0:
            return _PLENTY
        # The root of square · c² + linear · c = seconds, in a form that loses no digits when square is tiny.
        count = 2 * seconds / (linear + sqrt(linear * linear + 4 * square * seconds))
        return int(min(count, _PLENTY))
