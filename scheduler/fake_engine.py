"""An engine without a model: it obeys the step protocol to the letter and finds out whoever does not.

It knows nothing but the bytes of the plans, like a real rank. Instead of keys and values it writes, at every position
that a plan computes, the token and a hash of the whole sequence up to there into the slot that the block table names.
Before it samples it reads the whole context back through the block table: any block mixed up, reused too early, grown
too late, or shared with a different prefix raises FakeEngineError. What it samples is a pure function of the seed and
all tokens so far, so `expected_output` says what an undisturbed run gives, and a test can ask for exactly those tokens
whatever has been preempted, aborted, restarted or batched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from treadle.transport.codec import Digest, Int32, pack, rank_codec, unpack
from treadle.transport.masks import ANYTHING, decode_masks
from treadle.transport.messages import Masks, RowStart, SamplingParams, StepPlan, StepResult, TokenLogprobs

from .config import CoreConfig
from .request import derive_seed

_MASK = (1 << 64) - 1
_START = 0x7EAD1E
_NOTHING = -1
EOS_EVERY = 12
"""One sampled token in so many is EOS, when there is one."""

CostModel = Callable[[int, int], int]
"""(tokens computed, rows) to microseconds, reported as `elapsed_us`."""


class FakeEngineError(AssertionError):
    """A plan that a real engine would have executed wrongly."""


@dataclass(slots=True, frozen=True)
class Expected:
    """An undisturbed run: all output tokens, why it ended ("stop" or "length"), and the stop token or -1."""

    tokens: list[int]
    finish: str
    stop_token: int


def _mix(value: int, token: int) -> int:
    value = ((value ^ (token + 1)) * 0x9E3779B97F4A7C15) & _MASK
    return value ^ (value >> 29)


def sample(prefix_hash: int, seed: int, banned: frozenset[int], vocab_size: int, eos: tuple[int, ...]) -> int:
    """The next token: depends on the whole sequence and the seed, on nothing else."""
    draw = _mix(_mix(prefix_hash, seed & 0xFFFFFFFF), seed >> 32)
    token = eos[0] if eos and draw % EOS_EVERY == 0 else (draw >> 16) % vocab_size
    for _ in range(vocab_size):
        if token not in banned:
            break
        token = (token + 1) % vocab_size
    return token


Allows = Callable[[list[int]], frozenset[int]]
"""The token ids that a grammar allows after these output tokens."""


def expected_output(
    prompt: list[int],
    params: SamplingParams,
    config: CoreConfig,
    *,
    seed: int | None = None,
    index: int = 0,
    allows: Allows | None = None,
) -> Expected:
    """What continuation `index` of this request must give. seed: what was drawn, for params that have none.

    allows: of a guided request. It must allow something that `min_tokens` does not ban.
    """
    own = derive_seed(params.seed if params.seed is not None else seed or 0, index)
    stop_ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(config.eos_token_ids))
    limit = config.capacity if params.max_tokens is None else min(config.capacity, len(prompt) + params.max_tokens)
    value = _START
    output: list[int] = []
    for token in prompt:
        value = _mix(value, token)
    while True:
        banned = frozenset(stop_ids) if len(output) < params.min_tokens else frozenset[int]()
        if allows is not None:
            banned |= frozenset(range(config.vocab_size)) - allows(output)
        token = sample(value, own, banned, config.vocab_size, config.eos_token_ids)
        output.append(token)
        value = _mix(value, token)
        if token in stop_ids and len(output) >= params.min_tokens:
            return Expected(output, "stop", token)
        if len(prompt) + len(output) >= limit:
            return Expected(output, "length", -1)


class _Row:
    """A rank's mirror of one row."""

    def __init__(self, start: RowStart) -> None:
        self.tokens: list[int] = unpack(start.tokens).tolist()
        self.hashes: list[int] = []
        self.table: list[int] = unpack(start.blocks).tolist()
        self.prompt_len = start.prompt_len
        self.computed = start.computed
        self.params = start.params
        self.seed = start.seed
        self.stop_ids = frozenset(unpack(start.stop_ids).tolist())
        self.extend_hashes()

    def extend_hashes(self) -> None:
        value = self.hashes[-1] if self.hashes else _START
        for token in self.tokens[len(self.hashes) :]:
            value = _mix(value, token)
            self.hashes.append(value)


class FakeEngine:
    """All ranks of a group at once. Plans are executed strictly in order.

    `run(frame)` executes at once and returns rank 0's result. For a pipeline with delay, `submit` plans and let
    `step` execute the oldest; it returns one result per rank, rank 0 first.
    """

    def __init__(self, config: CoreConfig, world_size: int = 1, cost: CostModel | None = None) -> None:
        self._config = config
        self._world_size = world_size
        self._cost = cost
        self._codec = rank_codec()
        self._encoder = rank_codec()
        self._digest = Digest()
        self._rows: dict[int, _Row] = {}
        self._queue: deque[bytes] = deque()
        self._masks: dict[int, bytes] = {}
        self._last_step: int | None = None
        slots = config.num_blocks * config.block_size
        self._slot_token = np.full(slots, _NOTHING, np.int32)
        self._slot_hash = np.zeros(slots, np.uint64)
        self._host_token = np.full((config.swap_blocks, config.block_size), _NOTHING, np.int32)
        self._host_hash = np.zeros((config.swap_blocks, config.block_size), np.uint64)

    @property
    def live_rows(self) -> int:
        return len(self._rows)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def submit(self, frame: bytes) -> None:
        """Queues an encoded StepPlan."""
        self._queue.append(frame)

    def submit_masks(self, frame: bytes) -> None:
        """Takes encoded Masks, of a plan that is queued or will be."""
        masks = self._codec.decode(frame)
        _require(isinstance(masks, Masks), "not masks")
        assert isinstance(masks, Masks)
        _require(masks.step not in self._masks, f"masks of step {masks.step} come twice")
        self._masks[masks.step] = frame

    def step(self) -> list[StepResult]:
        """Executes the oldest queued plan; raises FakeEngineError when it breaks the protocol."""
        frame = self._queue.popleft()
        plan = self._codec.decode(frame)
        _require(isinstance(plan, StepPlan), "not a plan")
        assert isinstance(plan, StepPlan)
        self._digest.add(frame)
        banned = self._banned(plan)
        tokens, logprobs, computed = self._execute(plan, banned)
        sampled = pack(tokens)
        digest = self._digest.add(sampled)
        elapsed = self._cost(computed, len(plan.rows) // 4) if self._cost is not None else 0
        first = StepResult(plan.step, 0, digest, sampled, elapsed, logprobs)
        others = (StepResult(plan.step, rank, digest, b"", elapsed) for rank in range(1, self._world_size))
        return [first, *others]

    def run(self, plan: StepPlan | bytes) -> StepResult:
        """Executes one plan at once; rank 0's result."""
        self.submit(plan if isinstance(plan, bytes) else self._encoder.encode(plan))
        return self.step()[0]

    # ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _banned(self, plan: StepPlan) -> dict[int, frozenset[int]]:
        """What the masks forbid, by row. Takes them into the digest."""
        rows = unpack(plan.guided).tolist()
        frame = self._masks.pop(plan.step, None)
        _require((frame is not None) == bool(rows), f"step {plan.step}: masks that nobody waits for, or none")
        if frame is None:
            return {}
        self._digest.add(frame)
        masks = self._codec.decode(frame)
        assert isinstance(masks, Masks)
        found = decode_masks(masks, len(rows), self._config.vocab_size)
        bits = np.unpackbits(found.words.view(np.uint8), axis=1, bitorder="little")[:, : self._config.vocab_size]
        return {
            row: frozenset(np.flatnonzero(bits[mask] == 0).tolist())
            for row, mask in zip(rows, found.rows.tolist(), strict=True)
            if mask != ANYTHING
        }

    def _execute(self, plan: StepPlan, masked: dict[int, frozenset[int]]) -> tuple[list[int], list[TokenLogprobs], int]:
        _require(self._last_step is None or plan.step == self._last_step + 1, f"step {plan.step} out of order")
        self._last_step = plan.step
        self._change_rows(plan)
        self._copy_out(plan)
        self._copy_in(plan)
        rows, counts = unpack(plan.rows).tolist(), unpack(plan.counts).tolist()
        _require(0 < len(rows) == len(counts) == len(set(rows)), "rows and counts do not pair, or a row runs twice")
        _require(set(rows) <= set(self._rows), "a row runs that was never started")
        _require(sum(counts) <= self._config.max_num_batched_tokens, "over the token budget")
        work = [(number, self._rows[number], count) for number, count in zip(rows, counts, strict=True)]
        for _, row, count in work:
            self._write(row, count)
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        for number, row, count in work:
            self._verify_context(number, row)
            logprobs += self._prompt_logprobs(number, row, count)
            if row.computed == len(row.tokens):
                tokens.append(self._sample(row, masked.get(number, frozenset())))
                logprobs += self._logprobs(number, row)
        return tokens, logprobs, sum(counts)

    def _change_rows(self, plan: StepPlan) -> None:
        for number in unpack(plan.release).tolist():
            _require(number in self._rows, f"row {number} is released and was not started")
            del self._rows[number]
        for start in plan.start:
            _require(start.row not in self._rows, f"row {start.row} is started twice")
            _require(0 <= start.row < self._config.max_num_seqs, f"row {start.row} does not exist")
            self._rows[start.row] = _Row(start)
        grow_rows, grow_blocks = unpack(plan.grow_rows).tolist(), unpack(plan.grow_blocks).tolist()
        for number, block in zip(grow_rows, grow_blocks, strict=True):
            self._rows[number].table.append(block)
        for row in self._rows.values():
            usable = all(0 < block < self._config.num_blocks for block in row.table)
            _require(usable and len(set(row.table)) == len(row.table), "a block table with a bad or repeated block")

    def _copy_out(self, plan: StepPlan) -> None:
        """What has moved is gone from where it was: whoever reads it there finds nothing."""
        pairs = unpack(plan.copy_out).reshape(-1, 2)
        self._require_blocks(pairs[:, 0], pairs[:, 1])
        tokens, hashes = self._by_block()
        for block, place in pairs.tolist():
            _require((tokens[block] != _NOTHING).all(), f"block {block} goes to host memory and was never filled")
            self._host_token[place], self._host_hash[place] = tokens[block], hashes[block]
            tokens[block] = _NOTHING

    def _copy_in(self, plan: StepPlan) -> None:
        pairs = unpack(plan.copy_in).reshape(-1, 2)
        self._require_blocks(pairs[:, 1], pairs[:, 0])
        tokens, hashes = self._by_block()
        for place, block in pairs.tolist():
            _require(self._host_token[place, 0] != _NOTHING, f"host block {place} is fetched and holds nothing")
            tokens[block], hashes[block] = self._host_token[place], self._host_hash[place]
            self._host_token[place] = _NOTHING

    def _by_block(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
        size = self._config.block_size
        return self._slot_token.reshape(-1, size), self._slot_hash.reshape(-1, size)

    def _require_blocks(self, blocks: Int32, places: Int32) -> None:
        """Of one direction: all exist, and none comes twice."""
        for what, numbers, low, end in (
            ("device", blocks, 1, self._config.num_blocks),
            ("host", places, 0, self._config.swap_blocks),
        ):
            good = ((low <= numbers) & (numbers < end)).all() and np.unique(numbers).size == numbers.size
            _require(good, f"copies of {what} blocks {numbers.tolist()}: one is not there, or twice")

    def _write(self, row: _Row, count: int) -> None:
        """All writes of a step come before all reads, as in each layer of a real engine."""
        end = row.computed + count
        _require(count > 0 and end <= len(row.tokens), f"{count} tokens to compute, {len(row.tokens)} are known")
        slots = self._slots(row, row.computed, end)
        self._slot_token[slots] = row.tokens[row.computed : end]
        self._slot_hash[slots] = np.array(row.hashes[row.computed : end], np.uint64)
        row.computed = end

    def _verify_context(self, number: int, row: _Row) -> None:
        slots = self._slots(row, 0, row.computed)
        same = self._slot_token[slots] == np.array(row.tokens[: row.computed], np.int32)
        same &= self._slot_hash[slots] == np.array(row.hashes[: row.computed], np.uint64)
        if not same.all():
            raise FakeEngineError(f"row {number}: position {int(same.argmin())} holds another sequence's state")

    def _slots(self, row: _Row, start: int, end: int) -> npt.NDArray[np.intp]:
        size = self._config.block_size
        _require(end <= len(row.table) * size, f"{end} tokens in {len(row.table)} blocks of {size}")
        positions = np.arange(start, end)
        return np.array(row.table, np.intp)[positions // size] * size + positions % size

    def _sample(self, row: _Row, masked: frozenset[int]) -> int:
        banned = row.stop_ids if len(row.tokens) - row.prompt_len < row.params.min_tokens else frozenset[int]()
        banned |= masked
        token = sample(row.hashes[-1], row.seed, banned, self._config.vocab_size, self._config.eos_token_ids)
        row.tokens.append(token)
        row.extend_hashes()
        return token

    # ── log-probabilities: made up, but of the right shape and at the right place ─────────────────────────────────────

    def _prompt_logprobs(self, number: int, row: _Row, count: int) -> list[TokenLogprobs]:
        if row.params.prompt_logprobs is None:
            return []
        end = min(row.computed + 1, row.prompt_len)
        positions = range(max(1, row.computed - count + 1), end)
        return [_logprob(number, position, row.tokens[position], row.params.prompt_logprobs) for position in positions]

    def _logprobs(self, number: int, row: _Row) -> list[TokenLogprobs]:
        if row.params.logprobs is None:
            return []
        return [_logprob(number, len(row.tokens) - 1, row.tokens[-1], row.params.logprobs)]


def _logprob(row: int, position: int, token: int, top: int) -> TokenLogprobs:
    values = np.full(top, -1.0, np.float32).tobytes()
    return TokenLogprobs(row, position, token, -1.0, 1, pack([token] * top), values)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise FakeEngineError(message)
