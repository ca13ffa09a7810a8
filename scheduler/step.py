"""A step on its way, and what is kept of it afterwards for whoever has to find out what happened."""

from __future__ import annotations

from dataclasses import dataclass, field

from treadle.transport.codec import unpack
from treadle.transport.messages import StepPlan, StepResult

from .request import Sequence


@dataclass(slots=True, frozen=True)
class Chunk:
    """Tokens of a prompt, or of what is computed again, in one step. last: the sequence gets a token by it."""

    sequence: Sequence
    tokens: int
    last: bool


@dataclass(slots=True)
class Step:
    """Times are the loop's. began_at: when it was sent or the one before it ended, whichever was later.

    frame: the plan's bytes, given up when the step has ended; masks: those of its masks, if any. tokens: that it
    computes. starts: rows that are new. late: half of its time has passed, and somebody was told. took: seconds, -1
    while it is on its way.

    By `time.perf_counter`, which has no coarser clock than its own: plan_at, ready_at, out_at: its plan was begun,
    encoded, sent; back_at: every rank has answered; applied_at; deliver_at, delivered_at: its tokens on their way to
    readers. chunks: of prompts that it computes.
    """

    number: int
    sent_at: float
    began_at: float
    frame: bytes
    tokens: int
    rows: int
    starts: int
    released: int
    masks: bytes = b""
    results: dict[int, StepResult] = field(default_factory=dict)
    late: bool = False
    took: float = -1.0
    plan_at: float = 0.0
    ready_at: float = 0.0
    out_at: float = 0.0
    back_at: float = 0.0
    applied_at: float = 0.0
    deliver_at: float = 0.0
    delivered_at: float = 0.0
    chunks: tuple[Chunk, ...] = ()

    @property
    def doing(self) -> str:
        begun = f", {self.starts} of them new" if self.starts else ""
        return f"at step {self.number}, computing {self.tokens} tokens in {self.rows} rows{begun}"

    def missing(self, ranks: int) -> list[int]:
        """Who has not answered."""
        return [rank for rank in range(ranks) if rank not in self.results]

    def __str__(self) -> str:
        how = f"took {self.took * 1e3:.2f} ms" if self.took >= 0 else f"answered by ranks {sorted(self.results)}"
        return (
            f"step {self.number}: {self.tokens} tokens, {self.rows} rows, {self.starts} started, "
            f"{self.released} released, {how}"
        )


def sent(plan: StepPlan, frame: bytes, now: float) -> Step:
    """`plan`, encoded as `frame`, goes out."""
    tokens = int(unpack(plan.counts).sum())
    return Step(plan.step, now, now, frame, tokens, len(plan.rows) // 4, len(plan.start), len(plan.release) // 4)
