"""Who kills engines? After a death the requests that were in flight are tried, so that the one at fault fails alone.

Most that are in flight at a death have nothing to do with it: another request's work did it, or the cause was outside.
So the first death only makes suspects, until each has brought a token again. No more than one suspect runs at a time,
beside those that are none. If the engine dies again, the one on trial is accused. It may still be innocent, for
somebody new was beside it, or the cause was outside once more; so it is tried again before anybody else runs, with
nobody beside it. Only who is in flight at a third death in a row, alone, has shown it.
"""

from __future__ import annotations

from collections.abc import Iterable

from .request import Outputs, Request


class Trials:
    """Which requests may begin, as long as some are suspects."""

    def __init__(self) -> None:
        self._current: Request | None = None
        self._accused: list[Request] = []

    def begin(self, suspects: Iterable[Request]) -> None:
        """The engine died under `suspects`, whose `failures` have been counted; nothing runs any more."""
        self._current = None
        known = dict.fromkeys((*suspects, *self._accused))
        self._accused = [request for request in known if request.failures > 1 and request.unfinished]
        for request in self._accused:
            request.accused = True

    def accused(self) -> Request | None:
        """Who has to bring a token before anybody else begins."""
        while self._accused and not (self._accused[0].failures and self._accused[0].unfinished):
            del self._accused[0]
        self._current = self._accused[0] if self._accused else self._current
        return self._accused[0] if self._accused else None

    def may_begin(self, request: Request) -> bool:
        """Whether it is no suspect, or its trial is now."""
        if not request.failures:
            return True
        other = self._current
        if other is not None and other is not request and other.failures and other.running:
            return False
        self._current = request
        return True

    def clear(self, outputs: Outputs) -> None:
        """Whoever is on trial and got a token is no suspect any more."""
        request = self._current
        if request is not None and any(o.tokens and o.sequence.request is request for o in outputs.each()):
            request.failures = 0
            self._current = None
