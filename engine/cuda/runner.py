"""Steps that are enqueued, not waited for: `submit` launches a plan, `collect` brings what it sampled.

Between the two the host plans and launches the next one. It can, because it knows how many tokens there are of each row
without knowing which, and the device keeps the tokens. See docs/gpu.md.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from treadle.engine.rows import Int64, RowMirror, Work
from treadle.engine.runner import PromptScorer, Scored, StepOutcome, TakeMasks
from treadle.engine.sampling.masks import LocalMasks, guided_places
from treadle.engine.sampling.sampler import SampleOutput, Sampler, row_faults
from treadle.engine.sampling.state import FILTERED, LISTS, LOGPROBS, MIN_TOKENS, PENALTIES, SamplingState
from treadle.engine.sampling.upload import pin, upload
from treadle.engine.swap import BlockCopies
from treadle.errors import ProtocolError
from treadle.transport.codec import unpack
from treadle.transport.mask_pages import MaskPages
from treadle.transport.messages import Masks, StepPlan, TokenLogprobs

from .graphs import Graphs
from .program import TURNS, StepProgram, decode_layout, mixed_layout, sample_layout

logger = logging.getLogger(__name__)
_EAGER = LISTS | PENALTIES | LOGPROBS
_NOWHERE = np.empty(0, np.int64)


@dataclass(slots=True)
class _Samples:
    """Entries of the sampling part of a packet. positions: where the token will stand. real: else it is discarded."""

    rows: Int64
    positions: Int64
    real: npt.NDArray[np.bool_]


@dataclass(slots=True)
class _Unsampled:
    """What is left to launch of a step whose logits are on their way. size: of the packet. places: of guided rows."""

    samples: _Samples
    size: int
    eager: bool
    places: Int64


@dataclass(slots=True)
class Ticket:
    """A step on its way. turn: where its results come. samples: how many were asked for.

    rows: that sample, in the work's order, and `places` theirs among the results; back: those in plan order. output: of
    the eager sampler, where it was needed. unsampled: while the step waits for masks.
    """

    turn: int
    samples: int
    rows: Int64
    places: Int64
    back: Int64
    output: SampleOutput | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    unsampled: _Unsampled | None = None


@runtime_checkable
class PipelinedRunner(Protocol):
    """A runner that can hold several steps at once; collected in the order of submission."""

    def submit(self, plan: StepPlan) -> Ticket:
        """Launches the plan; one with guided rows up to its logits only."""
        ...

    def sample(self, ticket: Ticket, masks: Masks) -> None:
        """Launches the rest of a step with guided rows, before any other plan is submitted."""
        ...

    def done(self, ticket: Ticket) -> bool:
        """Whether `collect` would return at once."""
        ...

    def collect(self, ticket: Ticket) -> StepOutcome: ...


class CudaRunner:
    """`StepRunner` and `PipelinedRunner`. Runs on a CPU too, without graphs, which is how its logic is tested.

    program: what it runs, for tests. pages: where masks are that are not sent.
    """

    def __init__(
        self,
        program: StepProgram,
        graphs: Graphs,
        mirror: RowMirror,
        sampling: SamplingState,
        sampler: Sampler,
        device: torch.device,
        copies: BlockCopies,
    ) -> None:
        self.program = program
        self._copies = copies
        self._graphs = graphs
        self._rows = program.rows
        self._mirror = mirror
        self._sampling = sampling
        self._sampler = sampler
        self._scorer = PromptScorer(program.model, mirror, sampling, sampler)
        cuda = device.type == "cuda"
        self._results = torch.zeros((TURNS, len(program.out)), dtype=torch.float64, pin_memory=cuda)
        self._arrays: list[npt.NDArray[np.float64]] = list(self._results.numpy())
        self._events = [torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(TURNS)] if cuda else []
        self._forwarded = [torch.cuda.Event(enable_timing=True) for _ in self._events]
        self._turn = 0
        self._open = 0
        self.pages: MaskPages | None = None
        self._pinned = not cuda

    def step(self, plan: StepPlan, take_masks: TakeMasks | None = None) -> StepOutcome:
        ticket = self.submit(plan)
        if plan.guided:
            if take_masks is None:
                raise ProtocolError(f"step {plan.step} has guided rows and nobody brings masks")
            self.sample(ticket, take_masks())
        return self.collect(ticket)

    def forget(self) -> None:
        self._mirror.forget()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Ticket:
        """Launches the plan. Waits for the device only for rows with penalties, lists or log-probabilities."""
        if self._open >= TURNS:
            raise RuntimeError(f"{self._open} steps are open already")
        work = self._mirror.apply(plan)
        if plan.copy_out or plan.copy_in:
            self._copies.run(plan)
        for row in unpack(plan.release).tolist():
            self._sampling.stop(row)
        for start in plan.start:
            self._sampling.start(start.row, start)
        if plan.start:
            self._rows.start(plan.start)
        scored = self._scorer.positions(work)
        sampled = work.rows[work.samples]
        eager = self._needs_eager(sampled)
        if work.num_decode == len(work.rows) and not scored:
            samples = _Samples(work.rows, work.starts + 1, work.samples)
            size = self._decode(work, samples)
            prompt_logprobs: list[TokenLogprobs] = []
        else:
            samples = _Samples(sampled, self._mirror.known[sampled], np.ones(len(sampled), np.bool_))
            size, prompt_logprobs = self._mixed(work, samples, scored)
        ticket = self._ticket(work, samples, size, eager)
        if self._events:
            self._forwarded[ticket.turn].record()
        ticket.prompt_logprobs = prompt_logprobs
        places = guided_places(plan, samples.rows) if plan.guided else _NOWHERE
        unsampled = _Unsampled(samples, size, eager, places)
        if plan.guided:
            ticket.unsampled = unsampled
        else:
            self._sample(ticket, unsampled, None)
        self._mirror.advance(work)
        self._open += 1
        return ticket

    @torch.inference_mode()
    def sample(self, ticket: Ticket, masks: Masks) -> None:
        """Launches the rest of a step with guided rows, before any other plan is submitted. Raises ProtocolError."""
        unsampled, ticket.unsampled = ticket.unsampled, None
        if unsampled is None:
            raise ProtocolError(f"masks of step {masks.step}, which waits for none")
        model, vocab_size = self.program.model, self._rows.vocab_size
        local = LocalMasks.of(masks, unsampled.places, model.vocab_start, model.vocab_local, vocab_size, self.pages)
        if masks.shared and self.pages is not None and not self._pinned:
            self._pinned = True
            if not pin(self.pages.whole):
                logger.warning("the driver does not pin the memory of masks: they are copied once more")
        self._sample(ticket, unsampled, local)

    def done(self, ticket: Ticket) -> bool:
        return ticket.unsampled is None and (not self._events or self._events[ticket.turn].query())

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> StepOutcome:
        """Waits for the step and reads what it sampled."""
        if self._events:
            self._events[ticket.turn].synchronize()
        self._open -= 1
        values = self._arrays[ticket.turn]
        tokens = values[ticket.back].astype(np.int64)
        faults = row_faults(ticket.rows, values[ticket.samples + ticket.places])
        logprobs = ticket.output.logprobs if ticket.output is not None else []
        return StepOutcome(tokens, ticket.prompt_logprobs + logprobs, faults, self._sample_seconds(ticket.turn))

    def _sample_seconds(self, turn: int) -> float:
        """By the device's clock, of a step that is done: from its logits to its tokens on their way to the host."""
        return self._forwarded[turn].elapsed_time(self._events[turn]) * 1e-3 if self._events else 0.0

    # ── a step's inputs ──────────────────────────────────────────────────────────────────────────────────────────────

    def _decode(self, work: Work, samples: _Samples) -> int:
        """Every row has one token. Returns the size of the ladder that was used."""
        rows, table, count = self._rows, self._mirror.table, len(work.rows)
        size = self._graphs.size_for(max(count, len(work.grow_rows)))
        layout, block = decode_layout(size), self._mirror.block_size
        packet = self.program.staging.take()
        self._fill_samples(packet, samples, size)
        positions, slots, numbers, lengths, address, value = layout.host(packet)
        page = work.starts // block
        _fill(positions, work.starts, 0)
        _fill(slots, table[work.rows, page].astype(np.int64) * block + (work.starts - page * block), 0)
        _fill(numbers, work.rows, rows.spare)
        _fill(lengths, work.starts + 1, 1)
        # Nobody's table is padded with itself: its first block is the null block.
        spare = rows.spare * rows.table.shape[1]
        _fill(address, rows.table_address(work.grow_rows, work.grow_pages), spare)
        _fill(value, table[work.grow_rows, work.grow_pages], 0)
        self.program.staging.send(layout.end)
        self._graphs.decode(size, int(work.starts.max()) + 1)
        return size

    def _mixed(self, work: Work, samples: _Samples, scored: list[Scored]) -> tuple[int, list[TokenLogprobs]]:
        """Some rows have more. Returns how many samples the packet has room for, and log-probabilities of prompts."""
        if len(work.grow_rows):
            blocks = self._mirror.table[work.grow_rows, work.grow_pages]
            self._rows.grow(work.grow_rows, work.grow_pages, blocks)
        count, wanted = len(work.rows), len(samples.rows)
        size = self._graphs.size_for(wanted) if wanted else 0
        ends = np.cumsum(work.counts)
        index = np.concatenate([(ends - 1)[work.samples], *(offsets for _, _, offsets in scored)])
        layout = mixed_layout(size, count, len(index))
        packet = self.program.staging.take()
        self._fill_samples(packet, samples, size)
        numbers, starts, lengths, query_starts, sample_index = layout.host(packet)
        numbers[:] = work.rows
        starts[:] = work.starts
        lengths[:] = work.starts + work.counts
        query_starts[0] = 0
        query_starts[1:] = ends
        sample_index[:] = index
        self.program.staging.send(layout.end)
        contexts: list[int] = (work.starts + work.counts).tolist()
        longest = int(work.counts.max())
        hidden = self.program.mixed(layout, [0, *ends.tolist()], contexts, work.num_decode, longest, work.whole)
        if wanted:
            self.program.model.logits_into(hidden[:wanted], self.program.logits[:wanted])
        return size, self._scorer.score(hidden[wanted:], scored)

    def _fill_samples(self, packet: npt.NDArray[np.int32], samples: _Samples, size: int) -> None:
        positions, targets, numbers = sample_layout(size).host(packet)
        _fill(positions, samples.positions, 0)
        where = self._rows.history_address(samples.rows, samples.positions)
        _fill(targets, np.where(samples.real, where, self._rows.trash), self._rows.trash)
        _fill(numbers, samples.rows, self._rows.spare)

    # ── what comes of it ─────────────────────────────────────────────────────────────────────────────────────────────

    def _needs_eager(self, rows: Int64) -> bool:
        """Whether one of the rows wants what the fused sampler has not."""
        if self.program.fused is None:
            return True
        flags = self._sampling.flags[rows]
        every = int(np.bitwise_or.reduce(flags))
        if every & MIN_TOKENS and not every & _EAGER:
            short = self._mirror.known[rows] - self._sampling.prompt_len[rows] < self._sampling.min_tokens[rows]
            return bool((short & (flags & MIN_TOKENS != 0)).any())
        return bool(every & _EAGER)

    def _ticket(self, work: Work, samples: _Samples, size: int, eager: bool) -> Ticket:
        """Where the results of the step will be."""
        real = np.flatnonzero(samples.real)
        rows = samples.rows[real]
        if not len(rows):
            size = 0
        elif eager:
            size, real = len(rows), np.arange(len(rows))
        self._turn = (self._turn + 1) % TURNS
        order = work.plan_order[work.samples]
        return Ticket(self._turn, size, rows, real, real[np.argsort(order, kind="stable")])

    def _sample(self, ticket: Ticket, step: _Unsampled, masks: LocalMasks | None) -> None:
        """Launches the samples, and the copy of what they bring."""
        if len(ticket.rows):
            if step.eager:
                ticket.output = self._sample_eagerly(step.samples, step.size, masks)
            else:
                if masks is not None:
                    self.program.mask(masks)
                self._graphs.sample(step.size, bool(np.bitwise_or.reduce(self._sampling.flags[ticket.rows]) & FILTERED))
        size = ticket.samples
        if size:
            self._results[ticket.turn, : 2 * size].copy_(self.program.out[: 2 * size], non_blocking=True)
        if self._events:
            self._events[ticket.turn].record()

    def _sample_eagerly(self, samples: _Samples, size: int, masks: LocalMasks | None) -> SampleOutput:
        program, device, real = self.program, self.program.logits.device, np.flatnonzero(samples.real)
        logits, targets = program.logits, sample_layout(size).device(program.staging.device)[1]
        if len(real) < len(samples.rows):
            index = upload(real, device)
            logits, targets = logits[index], targets[index]
            if masks is not None:
                masks = masks.among(real)
        logits, targets = logits[: len(real)].float(), targets[: len(real)]
        rows, positions = samples.rows[real], samples.positions[real]
        output = self._sampler.sample(logits, rows, positions, self._rows.history, positions, masks)
        program.finish(targets, output.tokens, output.peaks)
        return output


def _fill(array: npt.NDArray[np.int32] | npt.NDArray[np.int64], values: npt.NDArray[np.generic], rest: int) -> None:
    """The values, then `rest` up to the end."""
    count = len(values)
    array[:count] = values
    array[count:] = rest
