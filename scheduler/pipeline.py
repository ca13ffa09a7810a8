"""Steps on their way: sent, answered by every rank, agreed on, and watched, the oldest first.

The cost model is told how long a step took from the later of "its plan was sent" and "the result before it was here".
With a full pipeline the second holds, and it is the right one: the engine begins a step when it has ended the one
before, so what lies between two results is a step, and it is also what a stream waits for its next token. From sending
to receiving would count the step before it, too; the engine's own `elapsed_us` leaves out the way and the scheduler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from treadle.errors import EngineFailed, ProtocolError
from treadle.transport.codec import Digest, engine_codec
from treadle.transport.messages import Masks, StepPlan, StepResult

from .deadline import StepDeadline
from .engine_group import Death
from .loop_time import loop_time
from .step import Step, sent

_REMEMBERED = 64
_LATE = 0.5


class Pipeline:
    """All methods run on one loop. finished: steps, of all groups. recent: the last steps, for whoever asks later.

    ranks: that answer each step. serving: whether late steps matter now. on_late: a step has used up half of its time,
    in words. on_hang: all of it.
    """

    def __init__(
        self,
        ranks: int,
        deadline: StepDeadline,
        serving: Callable[[], bool],
        on_late: Callable[[str], object],
        on_hang: Callable[[Death, Step], None],
    ) -> None:
        self.finished = 0
        self.recent: deque[Step] = deque(maxlen=_REMEMBERED)
        self._ranks = ranks
        self._deadline = deadline
        self._serving = serving
        self._on_late = on_late
        self._on_hang = on_hang
        self._steps: deque[Step] = deque()
        self._digest = Digest()
        self._codec = engine_codec()
        self._last_result_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest(self) -> Step | None:
        return self._steps[0] if self._steps else None

    def find(self, number: int) -> Step | None:
        return next((step for step in self._steps if step.number == number), None)

    def missing(self, step: Step) -> list[int]:
        """Ranks that have not answered."""
        return step.missing(self._ranks)

    # ── the way ──

    def send(self, plan: StepPlan) -> Step:
        """Its `frame` is what every rank has to get now."""
        frame = self._codec.encode(plan)
        step = sent(plan, frame, loop_time())
        self._steps.append(step)
        self.recent.append(step)
        return step

    def mask(self, step: Step, masks: Masks) -> bytes:
        """What every rank has to get before it can end the step."""
        step.masks = self._codec.encode(masks)
        return step.masks

    def answer(self, result: StepResult) -> None:
        """One rank's. Raises ProtocolError for what it was not asked."""
        step = self.find(result.step)
        if step is None or result.rank in step.results:
            raise ProtocolError(f"an answer to step {result.step}, unasked")
        step.results[result.rank] = result

    def take(self) -> Step | None:
        """The oldest step, if every rank has answered it."""
        if self._steps and len(self._steps[0].results) == self._ranks:
            return self._steps.popleft()
        return None

    def disagreeing(self, step: Step) -> int | None:
        """The first rank that saw other plans, masks or tokens than rank 0, up to this step. Ask once, in order."""
        self._digest.add(step.frame)
        self._digest.add(step.masks)
        digest = self._digest.add(step.results[0].tokens)
        return next((rank for rank, answer in step.results.items() if answer.digest != digest), None)

    def lasted(self, step: Step, now: float) -> float:
        """Seconds, for the cost model, of a step whose result is here `now`."""
        seconds, self._last_result_at = now - max(step.sent_at, self._last_result_at), now
        return seconds

    def finish(self, step: Step) -> None:
        """The result was applied: progress."""
        now = loop_time()
        step.took, step.frame = now - step.began_at, b""
        self._deadline.observe(step.tokens, step.took)
        if self._steps:
            self._steps[0].began_at = now
        self.finished += 1

    def forget(self) -> None:
        """Another engine group: nothing is on its way."""
        self._steps.clear()
        self._digest = Digest()
        self._deadline.restart()
        self.unwatch()

    # ── the watch ──

    def watch(self) -> None:
        """Looks at the oldest step in time."""
        if self._timer is None and self._steps:
            self._timer = asyncio.get_running_loop().call_at(self._due(self._steps[0]), self._look)

    def unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self, step: Step) -> float:
        """When to look at a step: when half of its time has passed, and when all has."""
        return step.began_at + self._deadline.seconds(step.tokens) * (1.0 if step.late else _LATE)

    def _look(self) -> None:
        self._timer = None
        oldest = self.oldest
        if oldest is None or not self._serving():
            return
        if loop_time() < self._due(oldest):
            self.watch()
        elif not oldest.late:
            oldest.late = True
            self._on_late(f"stuck {oldest.doing}; ranks {self.missing(oldest)} have not answered")
            self.watch()
        else:
            self._hang(oldest)

    def _hang(self, oldest: Step) -> None:
        missing, seconds = self.missing(oldest), self._deadline.seconds(oldest.tokens)
        text = (
            f"engine ranks {missing} did not finish step {oldest.number} within {seconds:g} s; where "
            "steps take longer, give them more with step_timeout (--step-timeout) or step_timeout_floor"
        )
        self._on_hang(Death(missing[0] if missing else -1, oldest.number, "hang", EngineFailed(text)), oldest)
