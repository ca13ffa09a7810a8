"""One step on one rank: from the mirror to a flat batch, through the model and the sampler, back to the mirror."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
import torch

from treadle.errors import ProtocolError
from treadle.transport.codec import unpack
from treadle.transport.mask_pages import MaskPages
from treadle.transport.messages import Masks, RowFault, StepPlan, TokenLogprobs

from .batch import ForwardBatch
from .kv import KVCache
from .model import Decoder
from .rows import Int64, RowMirror, Work, spans
from .sampling.masks import LocalMasks, guided_places
from .sampling.sampler import Sampler
from .sampling.state import SamplingState
from .swap import BlockCopies

_SCORE_SLICE = 256
_NOTHING = np.empty(0, np.int64)
Scored = tuple[int, Int64, Int64]
"""A row, positions whose next prompt token is scored, and their offsets in the flat batch."""
TakeMasks: TypeAlias = Callable[[], Masks]
"""Waits for the masks of the step that runs."""


@dataclass(slots=True)
class StepOutcome:
    """tokens: int64, one per row that sampled, in plan order.

    sample_seconds: that the step took after its forward pass; 0 where a device runs both as one.
    """

    tokens: Int64
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    faults: list[RowFault] = field(default_factory=list)
    sample_seconds: float = 0.0


class StepRunner(Protocol):
    """What the loop of a rank needs of a runner."""

    def step(self, plan: StepPlan, take_masks: TakeMasks | None = None) -> StepOutcome:
        """take_masks: called once, after the forward pass, if the plan has guided rows."""
        ...

    def forget(self) -> None:
        """Releases every row, for a scheduler that starts anew on loaded ranks."""
        ...


class Runner:
    """Owns what a rank holds between steps. `step` is the whole engine: everything else only serves it.

    pages: where masks are that are not sent.
    """

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        mirror: RowMirror,
        sampling: SamplingState,
        sampler: Sampler,
        device: torch.device,
        copies: BlockCopies,
    ) -> None:
        self._model = model
        self._kv = kv
        self._copies = copies
        self._mirror = mirror
        self._sampling = sampling
        self._sampler = sampler
        self._scorer = PromptScorer(model, mirror, sampling, sampler)
        self._vocab_size = model.config.vocab_size
        self._device = device
        self.pages: MaskPages | None = None

    @torch.inference_mode()
    def step(self, plan: StepPlan, take_masks: TakeMasks | None = None) -> StepOutcome:
        work = self._mirror.apply(plan)
        if plan.copy_out or plan.copy_in:
            self._copies.run(plan)
        for row in unpack(plan.release).tolist():
            self._sampling.stop(row)
        for start in plan.start:
            self._sampling.start(start.row, start)
        scored = self._scorer.positions(work)
        batch = self._batch(work, scored)
        hidden = self._model.forward(batch, self._kv)
        forwarded = time.perf_counter()
        count = int(work.samples.sum())
        outcome = self._sample(work, hidden[:count], plan, take_masks)
        outcome.logprobs = self._scorer.score(hidden[count:], scored) + outcome.logprobs
        outcome.sample_seconds = time.perf_counter() - forwarded
        return outcome

    def forget(self) -> None:
        """Releases every row, for a scheduler that starts anew on loaded ranks."""
        self._mirror.forget()

    def _sample(self, work: Work, hidden: torch.Tensor, plan: StepPlan, take_masks: TakeMasks | None) -> StepOutcome:
        """Samples for the rows that reached their last known token; hidden: [S, hidden], one per such row."""
        rows = work.rows[work.samples]
        if not len(rows):
            self._mirror.commit(work, _NOTHING)
            return StepOutcome(_NOTHING)
        known = self._mirror.known[rows]
        logits = self._model.logits(hidden)
        masks = self._masks(plan, rows, take_masks) if plan.guided else None
        out = self._sampler.sample(logits, rows, known, self._mirror.tokens_tensor, known, masks)
        sampled = out.tokens.cpu().numpy()
        self._mirror.commit(work, sampled)
        back = np.argsort(work.plan_order[work.samples], kind="stable")
        return StepOutcome(sampled[back], out.logprobs, out.faults)

    def _masks(self, plan: StepPlan, rows: Int64, take_masks: TakeMasks | None) -> LocalMasks:
        if take_masks is None:
            raise ProtocolError(f"step {plan.step} has guided rows and nobody brings masks")
        places = guided_places(plan, rows)
        start, count = self._model.vocab_start, self._model.vocab_local
        return LocalMasks.of(take_masks(), places, start, count, self._vocab_size, self.pages)

    def _batch(self, work: Work, scored: list[Scored]) -> ForwardBatch:
        mirror, counts = self._mirror, work.counts
        ends = np.cumsum(counts)
        if work.num_decode == len(counts):
            rows, positions = work.rows, work.starts
        else:
            rows = np.repeat(work.rows, counts)
            positions = np.arange(ends[-1]) - np.repeat(ends - counts, counts) + np.repeat(work.starts, counts)
        blocks = mirror.table[rows, positions // mirror.block_size].astype(np.int64)
        context = (work.starts + counts).astype(np.int32)
        longest = int(context.max())
        pages = -(-longest // mirror.block_size)
        last = (ends - 1)[work.samples]
        return ForwardBatch(
            token_ids=self._tensor(mirror.tokens[rows, positions].astype(np.int64)),
            positions=self._tensor(positions),
            slots=self._tensor(blocks * mirror.block_size + positions % mirror.block_size),
            query_starts=[0, *ends.tolist()],
            context_lens=self._tensor(context),
            max_context=longest,
            block_tables=self._tensor(np.ascontiguousarray(mirror.table[work.rows, :pages])),
            num_decode=work.num_decode,
            sample_index=self._tensor(np.concatenate([last, *(offsets for _, _, offsets in scored)])),
            whole=work.whole,
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._device.type == "cpu" else tensor.to(self._device, non_blocking=True)


class PromptScorer:
    """Log-probabilities of prompt tokens, for the rows that asked for them."""

    def __init__(self, model: Decoder, mirror: RowMirror, sampling: SamplingState, sampler: Sampler) -> None:
        self._model = model
        self._mirror = mirror
        self._sampling = sampling
        self._sampler = sampler

    def positions(self, work: Work) -> list[Scored]:
        """What of this step's work is to be scored."""
        if not self._sampling.any_prompt_logprobs:
            return []
        scored = []
        for row, start, count, offset in spans(work):
            last = min(start + count, int(self._mirror.prompt_len[row]) - 1)
            if self._sampling.wants_prompt_logprobs(row) and last > start:
                scored.append((row, np.arange(start, last), np.arange(offset, offset + last - start)))
        return scored

    def score(self, hidden: torch.Tensor, scored: list[Scored]) -> list[TokenLogprobs]:
        """A slice at a time: the logits of a whole prompt would be gigabytes."""
        logprobs: list[TokenLogprobs] = []
        offset = 0
        for row, positions, _ in scored:
            for first in range(0, len(positions), _SCORE_SLICE):
                part = positions[first : first + _SCORE_SLICE]
                logits = self._model.logits(hidden[offset : offset + len(part)])
                targets = self._mirror.tokens[row, part + 1].astype(np.int64)
                logprobs += self._sampler.prompt_logprobs(logits, row, part + 1, targets)
                offset += len(part)
        return logprobs
