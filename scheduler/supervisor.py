"""Which engine group serves, and which one comes next: replaced with back-off, or by a spare that is loaded already.

The group that serves is the owner's to talk to. When it is lost, `replace` ends it and gives another. With `standby` a
spare group is kept ready: it serves at once, the lost one is ended meanwhile, and another spare is loaded after that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq

from treadle.errors import EngineStartFailed, ServiceClosed, TreadleError
from treadle.transport.endpoints import RuntimeDir
from treadle.transport.messages import Configure, StepResult

from .engine_group import Death, EngineGroup
from .lifecycle import GroupLost, backoff
from .options import ServiceOptions
from .setup import Held

logger = logging.getLogger("treadle")
_SPARE_DELAY = 1.0


class Supervisor:
    """All methods run on the loop's thread. `group`: the one that serves, None while there is none.

    attempts: restarts since the last finished step, which the owner sets to 0. failure: why the last one of those that
    are to replace a lost group did not start, "" while none has failed.
    on_result, on_death: of the serving group. on_spare_lost: what happened to the other one.
    """

    def __init__(
        self,
        configure: Configure,
        runtime: RuntimeDir,
        options: ServiceOptions,
        command: Sequence[str],
        leftovers: Sequence[Path],
        on_result: Callable[[StepResult], None],
        on_death: Callable[[Death], None],
        on_spare_lost: Callable[[GroupLost], None],
    ) -> None:
        self.configure = configure
        self.group: EngineGroup | None = None
        self.attempts = 0
        self.failure = ""
        self._phase = "loading"
        self._runtime = runtime
        self._options = options
        self._command = command
        self._leftovers = leftovers
        self._on_result = on_result
        self._on_death = on_death
        self._on_spare_lost = on_spare_lost
        self._made = 0
        self._living: set[EngineGroup] = set()
        self._beside: set[EngineGroup] = set()  # of other weights, until they serve
        self._spare: asyncio.Task[EngineGroup] | None = None
        self._spare_losses = 0
        self._hurry = asyncio.Event()
        self._endings: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> Held:
        """Starts the first group and returns what its ranks hold. Raises TreadleError."""
        self.group = await self.make()
        held = self.group.held
        # A later group must hold as many blocks as the core hands out, whatever is free by then.
        self.configure = msgspec.structs.replace(
            self.configure, num_blocks=held.num_blocks, swap_blocks=held.swap_blocks
        )
        self._order_spare(0.0)
        return held

    async def replace(self, error: TreadleError) -> TreadleError | None:
        """Ends the serving group and gives another; None when it serves, else why the last attempt failed."""
        lost, self.group = self.group, None
        if lost is not None:
            self._phase = "ending the lost group"
            await self._bury(lost)
        while self.attempts < self._options.max_restarts:
            delay = backoff(self.attempts)
            self.attempts += 1
            self._phase = f"waiting {delay:g} s: {_first_line(error)}" if delay else "loading"
            await asyncio.sleep(delay)
            self._phase = "loading"
            try:
                self.group = await self._next()
            except TreadleError as failed:
                logger.error("engine group did not start: %s", failed)
                error, self.failure = failed, _first_line(failed)
                continue
            self._phase, self.failure, self._spare_losses = "", "", 0
            self._order_spare(_SPARE_DELAY)
            return None
        return error

    async def adopt(self, group: EngineGroup, configure: Configure) -> None:
        """`group`, which `make` made of `configure`, serves from now on; the others are ended. Nothing is in flight.

        Raises EngineStartFailed, and changes nothing, when it was lost meanwhile.
        """
        if group.death is not None:
            raise group.death.error
        old, self.group, self.configure = self.group, group, configure
        self._beside.discard(group)
        others = self._living - {group}  # not those that a recovery makes meanwhile
        await self._forget_spare()
        for other in others & self._living:
            self._end_aside(other)
        logger.info("engine group %d serves in place of %d", group.number, old.number if old is not None else 0)
        self._spare_losses = 0
        self._order_spare(_SPARE_DELAY)

    async def discard(self, group: EngineGroup) -> None:
        """Ends a group that does not serve."""
        await group.stop(self._options.stop_timeout)
        self._gone(group)

    async def close(self) -> None:
        """Ends every group and waits until none is left."""
        self._closed = True
        self.group = None
        await self._forget_spare()
        await asyncio.gather(*self._endings, return_exceptions=True)
        await asyncio.gather(*(group.stop(self._options.stop_timeout) for group in self._living))
        self._living.clear()
        self._beside.clear()

    @property
    def progress(self) -> str:
        """What the group is at that is to serve; "" while one does. Other weights, loaded meanwhile, are none of it."""
        if self.group is not None:
            return ""
        coming = max(self._living - self._beside, key=lambda group: group.number, default=None)
        stages = coming.stages if self._phase == "loading" and coming is not None and coming.heard else ""
        return f"loading: {stages}" if stages else self._phase

    @property
    def spare_pids(self) -> list[int]:
        return [pid for group in self._living if group is not self.group for pid in group.pids]

    @property
    def spare(self) -> str:
        """Of the spare group: "" where none is kept, "ready", "loading", "lost"."""
        if not self._options.standby:
            return ""
        if self._stands_by(self._spare):
            return "ready"
        return "loading" if self._spare is not None and not self._spare.done() else "lost"

    # ── groups ──

    async def make(self, configure: Configure | None = None) -> EngineGroup:
        """A group that is ready, and does not serve yet. Raises TreadleError, and leaves nothing.

        configure: of other weights, which are for `adopt`.
        """
        self._made += 1
        number = self._made
        shared = self._runtime.path / f"shared-{number}"
        made_of = msgspec.structs.replace(
            configure or self.configure, shared_dir=str(shared), init_method=f"file://{shared / 'rendezvous'}"
        )
        group: EngineGroup | None = None
        try:
            if self._closed:
                raise ServiceClosed("the service was closed")
            shared.mkdir(mode=0o700)
            group = EngineGroup(
                number,
                made_of,
                self._runtime,
                self._leftovers,
                lambda result: self._result(number, result),
                lambda death: self._died(number, death),
                self._command,
            )
            self._living.add(group)
            if configure is not None:
                self._beside.add(group)
            await group.start(self._options.start_timeout)
            if group.death is not None:
                raise group.death.error
        except BaseException as error:
            if group is not None:
                await group.kill()
                self._gone(group)
            if isinstance(error, OSError | zmq.ZMQError):  # no process, descriptor or socket to be had
                raise EngineStartFailed(f"the engine group could not be started: {error}") from error
            raise
        return group

    async def _next(self) -> EngineGroup:
        """The spare group where there is one, or is about to be; else a new one."""
        spare, self._spare = self._spare, None
        if spare is not None:
            self._hurry.set()
            try:
                group = await spare
            except TreadleError as error:
                logger.error("the spare engine group did not start: %s", error)
            else:
                if group.death is None:
                    return group
        return await self.make()

    async def _bury(self, group: EngineGroup) -> None:
        """Ends a lost group: meanwhile where a spare takes over, first where its memory is needed."""
        ending = self._end_aside(group)
        if self.spare != "ready":
            await asyncio.shield(ending)

    def _end_aside(self, group: EngineGroup) -> asyncio.Task[None]:
        ending = asyncio.get_running_loop().create_task(self._end(group), name="treadle-end-group")
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return ending

    async def _end(self, group: EngineGroup) -> None:
        await group.kill()
        self._gone(group)

    def _gone(self, group: EngineGroup) -> None:
        self._living.discard(group)
        self._beside.discard(group)

    # ── the spare one ──

    def _order_spare(self, delay: float) -> None:
        if self._options.standby and self._spare is None and not self._closed:
            self._hurry.clear()
            self._spare = asyncio.get_running_loop().create_task(self._load_spare(delay), name="treadle-spare")
            self._spare.add_done_callback(self._spare_loaded)

    async def _load_spare(self, delay: float) -> EngineGroup:
        """Not at once: who serves now has to catch up first, unless it is lost too."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), delay + backoff(self._spare_losses))
        await asyncio.gather(*self._endings, return_exceptions=True)
        group = await self.make()
        logger.info("engine group %d stands by", group.number)
        return group

    def _spare_loaded(self, task: asyncio.Task[EngineGroup]) -> None:
        """Or it was not, and nobody waits for it: whoever does, asks for its error."""
        if task.cancelled() or (error := task.exception()) is None or task is not self._spare or self._closed:
            return
        logger.error("the spare engine group did not start: %s", error)
        self._replace_spare()

    def _replace_spare(self) -> None:
        """It is lost. One that is lost again and again costs processors and says nothing new: there is a limit."""
        self._spare, self._spare_losses = None, self._spare_losses + 1
        if self._spare_losses <= self._options.max_restarts:
            self._order_spare(_SPARE_DELAY)
        else:
            logger.error("no spare engine group is loaded any more until the one that serves is replaced")

    async def _forget_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.cancel()
            await asyncio.gather(spare, return_exceptions=True)

    # ── what the groups say ──

    def _result(self, number: int, result: StepResult) -> None:
        if self.group is not None and self.group.number == number:
            self._on_result(result)

    def _died(self, number: int, death: Death) -> None:
        if self.group is not None and self.group.number == number:
            self._on_death(death)
            return
        event = GroupLost(
            group=number,
            rank=death.rank,
            step=death.step,
            cause=death.cause,
            doing="standing by",
            detail=str(death.error),
            serving=False,
        )
        self._on_spare_lost(event)
        for group in [group for group in self._living if group.number == number]:
            self._end_aside(group)
            if self._is_spare(group):
                self._replace_spare()

    def _is_spare(self, group: EngineGroup) -> bool:
        return self._stands_by(self._spare) and self._spare is not None and self._spare.result() is group

    @staticmethod
    def _stands_by(spare: asyncio.Task[EngineGroup] | None) -> bool:
        return spare is not None and spare.done() and not spare.cancelled() and spare.exception() is None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
