"""From the loss of the serving engine group to the next one, or to the end; and what is known of it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from treadle.errors import TreadleError

from .engine_group import Death
from .lifecycle import GaveUp, GroupLost, GroupReady, ServiceEvent
from .step import Step
from .supervisor import Supervisor

logger = logging.getLogger("treadle")
_REMEMBERED_EVENTS = 64


class Recovery:
    """Runs on one loop. events: the last ones. lost: the last group that was, at `lost_at`. count: of replacements.

    on_event: told of every event. What it has the service do: forget: no step is on its way any more. resume: a group
    serves. give_up: none will, and after how many restarts; it has to `tell`.
    """

    def __init__(
        self,
        on_event: Callable[[ServiceEvent], None] | None,
        forget: Callable[[], None],
        resume: Callable[[], None],
        give_up: Callable[[GaveUp], None],
    ) -> None:
        self.events: deque[ServiceEvent] = deque(maxlen=_REMEMBERED_EVENTS)
        self.lost: GroupLost | None = None
        self.lost_at = 0.0
        self.count = 0
        self._on_event = on_event
        self._forget = forget
        self._resume = resume
        self._give_up = give_up
        self._task: asyncio.Task[None] | None = None

    def tell(self, event: ServiceEvent) -> None:
        logger.log(logging.WARNING if isinstance(event, GroupReady) else logging.ERROR, "%s", event)
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(event)

    def begin(self, supervisor: Supervisor, group: int, death: Death, step: Step | None) -> None:
        """Has another group in place of `group`. step: the one in question; None between steps."""
        loop = asyncio.get_running_loop()
        self.lost = GroupLost(
            group=group,
            rank=death.rank,
            step=step.number if step is not None else death.step,
            cause=death.cause,
            doing=step.doing if step is not None else "between steps",
            detail=str(death.error),
        )
        self.lost_at = loop.time()
        self.tell(self.lost)
        self._task = loop.create_task(self._recover(supervisor, death.error), name="treadle-recovery")

    async def cancel(self) -> None:
        """Ends it where it is, and waits for that."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _recover(self, supervisor: Supervisor, error: TreadleError) -> None:
        """What was committed is prefilled again (D7)."""
        failure: Exception | None
        try:
            self._forget()
            failure = await self._replace(supervisor, error)
        except Exception as unforeseen:  # whatever it is, nobody may be left waiting for ever
            logger.exception("recovery failed")
            failure = unforeseen
        if failure is not None:
            self._give_up(GaveUp(attempts=supervisor.attempts, detail=str(failure)))

    async def _replace(self, supervisor: Supervisor, error: TreadleError) -> Exception | None:
        spared = supervisor.spare == "ready"
        failure = await supervisor.replace(error)
        if failure is not None or supervisor.group is None:
            return failure
        self.count += 1
        seconds = asyncio.get_running_loop().time() - self.lost_at
        self._resume()
        self.tell(
            GroupReady(group=supervisor.group.number, seconds=seconds, attempts=supervisor.attempts, spare=spared)
        )
        return None
