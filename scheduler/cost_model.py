"""What a step costs: a linear model of its shape, learned while it runs.

    seconds ≈ step + prefill_token · T + decode_row · R + context_token · C + chunk_pair · P
              + block_out · O + block_in · I

T tokens in chunks of prompts, R rows that decode, C positions of K/V that those rows read, P pairs of a chunk's query
and a key that it attends to, O and I blocks copied to host memory and back. Decodes and chunks attend at very different
prices (one is bound by memory, the other by arithmetic), so each has a term of its own.

The model has no clock. Whoever measures steps calls `observe`; the same observations give the same coefficients.
"""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.errors import ConfigError

Vector = npt.NDArray[np.float64]

_MEMORY = 512
"""Observations after which one counts a third: the forgetting factor is 1 − 1/512."""
_EAGER, _BATCH = 64, 16
"""The first 64 observations are learned from one by one, later ones 16 at a time: solving costs more than appending."""
_HOLD = 1e-4
"""How strongly a coefficient stays where it was, as a share of what the observations say about it."""
_COPIES = slice(5, 7)
_TRUST = 16.0
"""Steps with copies that a coefficient of copies as it was given weighs as much as."""
_SIZE = 7
MOST_COST = 1_000_000
"""Seconds: what costs more is a slip of the hand, and no time of day could be reckoned with it."""


class StepShape(msgspec.Struct, frozen=True, gc=False):
    """What a step computes, as far as its duration depends on it.

    prefill_tokens: of all chunks. decode_rows: rows that compute one token and sample. context_tokens: positions of
    K/V that the decode rows read, their own included. chunk_pairs: sum of `chunk_pairs` over the chunks. blocks_out,
    blocks_in: copied to host memory and back.
    """

    prefill_tokens: int
    decode_rows: int
    context_tokens: int
    chunk_pairs: int = 0
    blocks_out: int = 0
    blocks_in: int = 0

    def with_chunk(self, count: int, end: int) -> StepShape:
        """The shape with one more chunk of `count` tokens that ends at a context of `end` tokens."""
        pairs = self.chunk_pairs + chunk_pairs(count, end)
        tokens, out, back = self.prefill_tokens + count, self.blocks_out, self.blocks_in
        return StepShape(tokens, self.decode_rows, self.context_tokens, pairs, out, back)


def chunk_pairs(count: int, end: int) -> int:
    """Query–key pairs of a causal chunk of `count` tokens whose last one sees `end` tokens: about count · end."""
    return count * end - count * (count - 1) // 2


class StepCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients of the model, in seconds; see the head of this file. Zero is "costs nothing"."""

    step: float = 0.0
    prefill_token: float = 0.0
    decode_row: float = 0.0
    context_token: float = 0.0
    chunk_pair: float = 0.0
    block_out: float = 0.0
    block_in: float = 0.0

    def predict(self, shape: StepShape) -> float:
        """Seconds that such a step takes. An empty shape costs what a step costs at least."""
        return (
            self.step
            + self.prefill_token * shape.prefill_tokens
            + self.decode_row * shape.decode_rows
            + self.context_token * shape.context_tokens
            + self.chunk_pair * shape.chunk_pairs
            + self.block_out * shape.blocks_out
            + self.block_in * shape.blocks_in
        )

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes | str) -> StepCosts:
        """Raises ConfigError for what is not an object of these names with numbers from 0."""
        try:
            costs = msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"step costs: {error}; known are {', '.join(cls.__struct_fields__)}") from error
        return check_costs(costs)


def check_costs(costs: StepCosts) -> StepCosts:
    """The same costs. Raises ConfigError when one is not a number of seconds from 0 to `MOST_COST`."""
    for name, value in msgspec.structs.asdict(costs).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_COST:  # nor NaN
            raise ConfigError(f"step costs: {name}={value!r}: a number of seconds from 0 to {MOST_COST:,} is allowed")
    return costs


class CostModel:
    """Recursive least squares with forgetting, in information form, over coefficients that are not negative.

    What is minimised is the *relative* error, Σ ((predicted − seconds) / scale)², scale being the greater of what was
    measured and what was predicted: short steps count as much as long ones, a step that took a hundred times its time
    (a page fault, a compilation) pulls hardly at all, and so does a result that was read in one go with the last one.
    Where the observations say nothing of a coefficient (no prefill for a while), it stays as it was: a small term
    holds each coefficient near its last value, which also settles what a single shape cannot tell apart.

    Copies are few, and their cost is measured before the first step. So what was given of them counts as much as
    `_TRUST` steps with copies that took their usual time, and counts again when such steps have become rare: one slow
    step must not end all swapping, for what is never done is never learned.
    """

    def __init__(self, coefficients: StepCosts | None = None) -> None:
        self._costs = StepCosts() if coefficients is None else check_costs(coefficients)
        self._values = np.array(msgspec.structs.astuple(self._costs), np.float64)
        self._given = self._values[_COPIES].copy()
        self._copied: Vector = np.zeros((2, 2))
        self._information: Vector = np.zeros((_SIZE, _SIZE))
        self._target: Vector = np.zeros(_SIZE)
        self._pending: list[tuple[StepShape, float]] = []
        self.observations = 0

    @property
    def coefficients(self) -> StepCosts:
        return self._costs

    @property
    def known(self) -> bool:
        """Something was given or learned; before that every prediction is 0."""
        return bool(self._values[: _COPIES.start].any())

    def predict(self, shape: StepShape) -> float:
        """As of the coefficients."""
        return self._costs.predict(shape)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took so long. What is not a positive, finite time is ignored."""
        if not 0.0 < seconds < float("inf"):
            return
        self._pending.append((shape, seconds))
        self.observations += 1
        if self.observations <= _EAGER or len(self._pending) >= _BATCH:
            self._learn()

    def _learn(self) -> None:
        shapes = np.array([_features(shape) for shape, _ in self._pending])
        seconds = np.array([seconds for _, seconds in self._pending])
        age = np.arange(len(seconds) - 1, -1, -1)
        predicted = shapes @ self._values
        weights = (1 - 1 / _MEMORY) ** age / np.maximum(seconds, predicted) ** 2
        weighted = shapes * weights[:, None]
        self._information *= (1 - 1 / _MEMORY) ** len(seconds)
        self._target *= (1 - 1 / _MEMORY) ** len(seconds)
        self._information += weighted.T @ shapes
        self._target += weighted.T @ seconds
        copies = shapes[:, _COPIES]
        if copies.any():
            expected = np.where(predicted > 0, predicted, seconds)[:, None]
            self._copied += (copies > 0).sum(0), ((copies / expected) ** 2).sum(0)
        self._pending.clear()
        self._solve()

    def _solve(self) -> None:
        """The new coefficients, in units in which each feature's information is 1, so that numbers stay near 1.

        Those of features that were never seen stay as they are.
        """
        scale = np.sqrt(np.diag(self._information))
        seen = scale.nonzero()[0]
        unit, hold = scale[seen], np.full(_SIZE, _HOLD)
        steps, weight = self._copied
        hold[_COPIES] = _TRUST * weight / np.maximum(steps, 1) / np.maximum(scale[_COPIES], 1e-12) ** 2
        self._values[_COPIES] = self._given
        matrix = self._information[np.ix_(seen, seen)] / np.outer(unit, unit) + np.diag(hold[seen])
        held = hold[seen] * self._values[seen] * unit
        self._values[seen] = solve_non_negative(matrix, self._target[seen] / unit + held) / unit
        self._costs = StepCosts(**dict(zip(StepCosts.__struct_fields__, self._values.tolist(), strict=True)))


def solve_non_negative(matrix: Vector, target: Vector) -> Vector:
    """The x ≥ 0 with the least xᵀMx/2 − xᵀt, for a positive definite M, exactly.

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23), on normal equations.
    """
    x = np.zeros_like(target)
    passive = np.zeros(target.size, np.bool_)
    for _ in range(8 * target.size):
        gain = np.where(passive, -np.inf, target - matrix @ x)
        best = int(gain.argmax())
        if gain[best] <= 1e-12:
            break
        passive[best] = True
        while True:
            trial = np.zeros_like(x)
            trial[passive] = np.linalg.solve(matrix[np.ix_(passive, passive)], target[passive])
            blocked = passive & (trial <= 0)
            if not blocked.any():
                x = trial
                break
            share = (x[blocked] / (x[blocked] - trial[blocked])).min()
            x = x + share * (trial - x)
            passive &= x > 1e-15
            x[~passive] = 0.0
            if not passive.any():
                break
    return x


def _features(shape: StepShape) -> tuple[float, ...]:
    return (
        1.0,
        shape.prefill_tokens,
        shape.decode_rows,
        shape.context_tokens,
        shape.chunk_pairs,
        shape.blocks_out,
        shape.blocks_in,
    )
