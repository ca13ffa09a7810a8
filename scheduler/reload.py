"""Other weights of the same shape take over: every request goes on, from the tokens that it has."""

from __future__ import annotations

import asyncio

import msgspec

from treadle.errors import InvalidRequest, ServiceClosed
from treadle.transport.messages import Configure

from .engine_group import EngineGroup
from .observers import Observers
from .options import ModelFacts
from .setup import check_same_shape
from .standing import Standing
from .step_loop import StepLoop
from .supervisor import Supervisor


class Reload:
    """One at a time."""

    def __init__(self, standing: Standing, steps: StepLoop, observers: Observers) -> None:
        self._standing = standing
        self._steps = steps
        self._observers = observers
        self._changing = False

    async def change(self, facts: ModelFacts) -> None:
        """The new group is loaded beside the old one.

        Raises ConfigError for another shape, InvalidRequest while others are loaded, ServiceClosed, and whatever keeps
        the group from starting; the old one then goes on.
        """
        supervisor = self._standing.supervisor
        if supervisor is None or self._standing.core is None:
            raise ServiceClosed("the service is not ready for other weights")
        if self._changing:  # whichever group is adopted first ends the other
            raise InvalidRequest("other weights are being loaded already: ask again when they serve")
        check_same_shape(self._standing.facts, facts)
        self._changing = True
        try:
            configure = msgspec.structs.replace(supervisor.configure, model=facts.path)
            await self._adopt(supervisor, await self._load(supervisor, configure), configure, facts)
        finally:
            self._changing = False

    async def _load(self, supervisor: Supervisor, configure: Configure) -> EngineGroup:
        try:
            return await supervisor.make(configure)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise ServiceClosed("the service was closed while other weights were loaded") from None

    async def _adopt(self, supervisor: Supervisor, group: EngineGroup, configure: Configure, facts: ModelFacts) -> None:
        self._standing.paused = True
        try:
            if await self._steps.steady() != "ready":
                raise ServiceClosed(f"the service is {self._standing.state}: {self._standing.detail}".rstrip(": "))
            if group.death is not None:  # before anything is forgotten: the old ranks know all rows, and go on
                raise group.death.error
            self._steps.forget()
            await supervisor.adopt(group, configure)
            self._standing.facts = facts
            self._observers.note("reload", "other weights serve", facts.path)
        except BaseException:
            await supervisor.discard(group)
            raise
        finally:
            self._standing.paused = False
            self._steps.pump()
