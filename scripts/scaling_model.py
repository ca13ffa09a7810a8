"""What a tensor-parallel step should take, from what one GPU takes and what a sum between GPUs takes. No free numbers.

A step on t GPUs is three terms (docs/tensor-parallel.md derives them):

  shared   bytes / bandwidth, or products / matrix rate, of the rank with the largest share: it shrinks with t
  rest     what one GPU takes beyond that, as measured there: norms, launches, sampling, kernels slower than a copy
  summed   2 all-reduces per layer and 1 for the embedding, each as long as one of its size was measured to take

Part of the rest is divided too, and nobody has measured which: if all of it is, the step is as short as it can be, if
none, as long. Only the measurements on one GPU and of the all-reduces go in, so what is predicted for 2, 3 or 4 GPUs
can be wrong.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from compare_gpu import Limits, Shape

from treadle.engine.config import ModelConfig
from treadle.engine.sharding import shard_for

BYTES = 2  # of a bfloat16


@dataclass(frozen=True, slots=True)
class Sums:
    """Measured all-reduces of one group size: `micros[i]` for `sizes[i]` bytes, sizes ascending."""

    sizes: Sequence[int]
    micros: Sequence[float]

    def seconds(self, size: int) -> float:
        """Between two measured sizes on the straight line between them; beyond the last at its rate."""
        at = bisect_left(self.sizes, size)
        if at == 0:
            return self.micros[0] * 1e-6
        if at == len(self.sizes):
            return self.micros[-1] * 1e-6 * size / self.sizes[-1]
        low, high = self.sizes[at - 1], self.sizes[at]
        share = (size - low) / (high - low)
        return (self.micros[at - 1] + share * (self.micros[at] - self.micros[at - 1])) * 1e-6


@dataclass(frozen=True, slots=True)
class Shares:
    """What the busiest rank holds of each part, as a fraction: 1/t where it divides, more where it does not."""

    attention: float
    mlp: float
    vocabulary: float


def shares(config: ModelConfig, ranks: int) -> Shares:
    """The busiest rank is the same in every part: larger shares go to the first ranks."""
    shard = shard_for(config, 0, ranks)
    return Shares(
        attention=shard.q_heads.size / config.num_heads,
        mlp=shard.intermediate.size / config.intermediate_size,
        vocabulary=shard.vocab.size / config.vocab_size,
    )


@dataclass(frozen=True, slots=True)
class Model:
    """Times in seconds. limits: of one GPU."""

    config: ModelConfig
    shape: Shape
    limits: Limits

    def decode(self, ranks: int, batch: int, context: float) -> float:
        """Shared term of a decode step: bytes of the busiest rank, or its products if they take longer."""
        part, attention, mlp, head = shares(self.config, ranks), *self._elements()
        elements = part.attention * attention + part.mlp * mlp + part.vocabulary * head
        cached = part.attention * batch * context * self.shape.kv_bytes_per_token
        moved = (BYTES * elements + cached) / self.limits.bandwidth
        return max(moved, 2 * batch * elements / self.limits.rate)

    def prefill(self, ranks: int, length: int) -> float:
        """Shared term of one prompt: products, and attention over half of the square, for the mask is causal."""
        part, attention, mlp, head = shares(self.config, ranks), *self._elements()
        products = 2 * length * (part.attention * attention + part.mlp * mlp) + 2 * part.vocabulary * head
        looks = part.attention * 4 * self.shape.layers * self.shape.q_width * length * length / 2
        return (products + looks) / self.limits.rate

    def summed(self, sums: Sums, tokens: int) -> float:
        """All sums of a step of so many tokens, one after another, as the layers wait for them."""
        number = 2 * self.shape.layers + 1
        return number * sums.seconds(tokens * self.config.hidden_size * BYTES)

    def _elements(self) -> tuple[int, int, int]:
        """Elements that a token is multiplied with: attention's, the MLP's, the head's."""
        mlp = 3 * self.shape.layers * self.config.hidden_size * self.config.intermediate_size
        return self.shape.layer_weights - mlp, mlp, self.shape.head_weights


def predict(shared_one: float, measured_one: float, shared: float, summed: float) -> tuple[float, float]:
    """Seconds on several GPUs, at least and at most: the rest divided like the shared term, and not at all."""
    return measured_one * shared / shared_one + summed, shared + max(0.0, measured_one - shared_one) + summed
