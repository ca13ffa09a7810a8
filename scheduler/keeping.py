"""How accepted requests outlive the service: the journal, and who waits in it for its client to come back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from treadle.errors import TreadleError
from treadle.transport.messages import Submit

from .core import Core
from .delivery import Route, Sink
from .journal import Journal
from .orphans import Orphans
from .recording import RecordedCore
from .request import Output, Outputs, Request
from .request import Sequence as RequestSequence

logger = logging.getLogger("treadle")


class Keeping:
    """abort: ends a request of the core by its name, or one continuation of it."""

    def __init__(self, journal: Journal, abort: Callable[[str, int], None]) -> None:
        self._journal = journal
        self._abort = abort
        self._orphans = Orphans()
        self._other_names: dict[str, str] = {}

    @classmethod
    async def open(cls, path: str, sync_seconds: float, abort: Callable[[str, int], None]) -> Keeping:
        """A large journal takes seconds to read: on a thread, since the service says meanwhile that it starts.

        Raises ConfigError.
        """
        opening = asyncio.get_running_loop().run_in_executor(None, Journal, Path(path), sync_seconds)
        try:
            return cls(await asyncio.shield(opening), abort)
        except asyncio.CancelledError:
            while not opening.done():  # nobody asks for it any more, however often they say so; it must not stay open
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([opening])
            if opening.exception() is None:
                await opening.result().close()
            raise

    def take_up(self, core: Core | RecordedCore, now: float) -> list[Request]:
        """What the service before this one had accepted goes on, for now without its readers. Returns it."""
        taken: list[Request] = []
        for number, submit in self._journal.unfinished.items():
            try:
                named = msgspec.structs.replace(submit, id=self._orphan_name(submit.key))
                request = core.add(named, now, bounded=False)
            except TreadleError as error:
                logger.error("a request of the journal cannot go on: %s", error)
                self._journal.end_all(number, submit)
                continue
            self._orphans.add(submit, request, number)
            taken.append(request)
        return taken

    def accept(self, message: Submit) -> int:
        """A new request was accepted. Returns its number; -1 for one that is not to be kept."""
        if not message.key:
            return -1
        number = self._journal.accept(message)
        self._journal.flush()
        return number

    def claim(self, message: Submit, sink: Sink, name: str) -> bool:
        """Whether the request runs already, or has ended meanwhile, since the service before this one accepted it.

        name: of the request in the core, as its new client will call it.
        """
        if not message.key:
            return False
        old = self._orphan_name(message.key)
        request = self._orphans.claim(message, sink)
        if request is None:
            self._abort(old, -1)
            return False
        if request.unfinished:
            self._other_names[name] = old
            for index in message.ended:
                self._abort(old, index)
        return True

    def name(self, name: str) -> str:
        """What the core calls the request that a client calls `name`."""
        return self._other_names.get(name, name)

    def drop_orphans(self) -> None:
        """Nobody came back for them."""
        for key in self._orphans.keys():  # noqa: SIM118  # a list: it changes
            self._orphans.drop(key)
            self._abort(self._orphan_name(key), -1)

    def note_step(self, outputs: Outputs) -> None:
        """Tokens of sequences that go on. `note` has to follow."""
        for sequence, token in zip(outputs.sequences, outputs.tokens, strict=True):
            route = _route(sequence)
            if route is not None:
                self._journal.token(route.number, sequence.index, token)

    def note(self, outputs: Sequence[Output]) -> None:
        """Tokens and ends; then all that this turn brought is written, before anybody is told."""
        for output in outputs:
            route = _route(output.sequence)
            if route is None:
                continue
            for token in output.tokens:
                self._journal.token(route.number, output.sequence.index, token)
            if output.finish:
                self._journal.end(route.number, output.sequence.index)
                if not output.sequence.request.unfinished:
                    self._other_names.pop(f"{route.sink.name}/{route.request_id}", None)
        self._journal.flush()

    async def close(self) -> None:
        await self._journal.close()

    def _orphan_name(self, key: str) -> str:
        return f"{self._orphans.name}/{key}"


def _route(sequence: RequestSequence) -> Route | None:
    """Where a sequence that is kept goes; None for the others."""
    context = sequence.request.context
    return context if isinstance(context, Route) and context.number >= 0 else None
