"""The step loop: `core.plan` → encode once → the same bytes to every rank → results of all ranks → digests agree →
`core.apply` → the next plan is sent → deltas go to their sinks. Up to `pipeline_depth` steps are on their way at once.

A step with guided rows gets its masks by a message of their own, when the tokens before them are known (`guidance/`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter

from treadle.errors import EngineFailed, ProtocolError
from treadle.transport.messages import Masks, StepResult

from .core import Core
from .engine_group import Death, EngineGroup
from .loop_time import loop_time
from .observers import Observers
from .outbox import Outbox
from .pipeline import Pipeline
from .policies.trouble import PolicyLog
from .recording import RecordedCore
from .standing import Standing
from .step import Step


class StepLoop:
    """All methods run on one loop. debug: the core is checked after each plan.

    make_masks: has those made whose tokens are there, for a group. on_death: the serving group is no good, and the step
    in question where it has landed.
    """

    def __init__(
        self,
        standing: Standing,
        pipeline: Pipeline,
        observers: Observers,
        outbox: Outbox,
        *,
        debug: bool,
        make_masks: Callable[[Core | RecordedCore, EngineGroup | None], None],
        on_death: Callable[[Death, Step | None], None],
    ) -> None:
        self._standing = standing
        self._pipeline = pipeline
        self._observers = observers
        self._outbox = outbox
        self._debug = debug
        self._make_masks = make_masks
        self._on_death = on_death
        self._policy_log = PolicyLog()
        self._landed = asyncio.Event()
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0

    # ── out ──

    def pump(self) -> None:
        """Sends the plans that can be made now, and sees to masks and timers."""
        standing = self._standing
        core, group = standing.core, standing.group
        if core is None or group is None or not standing.ready or standing.paused:
            return
        plan_at = perf_counter()
        while (plan := core.plan(now := loop_time())) is not None:
            started = core.started(plan) if plan.start else ()
            step = self._pipeline.send(plan)
            step.plan_at, step.ready_at = plan_at, perf_counter()
            group.broadcast(step.frame)
            step.out_at = plan_at = perf_counter()
            self._observers.sent(core, step, plan, started, now)
            if group.death is not None or not standing.ready:
                return
        self._make_masks(core, group)
        if self._debug:
            core.check()
        if core.policy_errors != self._policy_log.told:
            self._policy_log.tell(core.policy_errors, core.policy_error, loop_time())
        self.arm_timers()

    def send_masks(self, group: EngineGroup | None, masks: Masks) -> None:
        """To the ranks of the step, if it is still on its way. group: that they were made for."""
        step = self._pipeline.find(masks.step)
        if group is not None and group is self._standing.group and step is not None and self._standing.ready:
            group.broadcast(self._pipeline.mask(step, masks))

    # ── back ──

    def on_result(self, result: StepResult) -> None:
        if not self._standing.ready:
            return
        try:
            self._pipeline.answer(result)
        except ProtocolError as error:
            self._on_death(Death(result.rank, result.step, "malformed", error), None)
            return
        while (step := self._pipeline.take()) is not None:
            self._finish(step)

    def _finish(self, step: Step) -> None:
        core = self._standing.core
        if core is None:
            return
        rank = self._pipeline.disagreeing(step)
        if rank is not None:
            error = EngineFailed(f"rank {rank} disagrees at step {step.number}")
            self._on_death(Death(rank, step.number, "disagreed", error), step)
            return
        now, step.back_at = loop_time(), perf_counter()
        seconds = self._pipeline.lasted(step, now)
        try:
            outputs = core.apply(step.results[0], now, seconds)
        except ProtocolError as malformed:
            self._on_death(Death(0, step.number, "malformed", malformed), step)
            return
        step.applied_at = perf_counter()
        self._observers.applied(core, now)
        self._note_progress(step)
        self._make_masks(core, self._standing.group)  # first of all: the ranks wait for these
        self.pump()  # the engines first, the readers after
        step.deliver_at = perf_counter()
        self._observers.landed(step)
        self._outbox.deliver_step(outputs)
        step.delivered_at = perf_counter()
        self._observers.delivered(step)

    def _note_progress(self, step: Step) -> None:
        self._pipeline.finish(step)
        if not self._pipeline:
            self._landed.set()
        if self._standing.supervisor is not None:
            self._standing.supervisor.attempts = 0

    def forget(self) -> None:
        """No step is on its way any more, and no row is anybody's: whoever had one waits for the next group."""
        self._pipeline.forget()
        if self._standing.core is not None:
            outputs = self._standing.core.reset(loop_time())
            self._observers.lost()
            self._outbox.deliver(outputs)

    # ── who waits for it ──

    async def steady(self) -> str:
        """Waits until no step will land any more and no group is being replaced. Returns the state then."""
        while self._standing.state == "recovering" or (self._pipeline and self._standing.ready):
            self._landed.clear()
            await self._landed.wait()
        return self._standing.state

    def look_again(self) -> None:
        """The state is another one, for whoever waits in `steady`."""
        self._landed.set()

    # ── timers ──

    def arm_timers(self) -> None:
        """For the oldest step, and for the first deadline of a request, which counts without an engine group, too."""
        self._pipeline.watch()
        if self._standing.core is None:
            return
        deadline = self._standing.core.next_deadline()
        if deadline is None or (self._timer is not None and self._timer_at <= deadline):
            return  # a timer that comes too early finds nothing to do and sets the next
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = max(deadline, loop_time())
        self._timer = asyncio.get_running_loop().call_at(self._timer_at, self._deadline_due)

    def close(self) -> None:
        """No timer fires any more, and nobody waits for a step."""
        self._landed.set()
        self._pipeline.unwatch()
        if self._timer is not None:
            self._timer.cancel()

    def _deadline_due(self) -> None:
        self._timer = None
        if self._standing.core is not None:
            self._outbox.deliver(self._standing.core.expire(loop_time()))
            self.pump()
            self.arm_timers()
