"""The requests that have not ended, and the one way out."""

from __future__ import annotations

from .admission import Admission
from .ordered_queue import OrderedQueue
from .request import NO_ROW, Output, Request
from .running import Running
from .stop_ids import StopIds
from .waiting import Waiting


class Unfinished:
    """requests: by id, in order of arrival. stop_ids: of all of them. finished: how many have ended.

    first_deadline: of all of them; kept, since every step asks.
    """

    def __init__(self, vocab_size: int, running: Running, waiting: Waiting, admission: Admission) -> None:
        self.requests: dict[str, Request] = {}
        self.stop_ids = StopIds(vocab_size)
        self.finished = 0
        self._running = running
        self._waiting = waiting
        self._admission = admission
        self._deadlines: OrderedQueue[tuple[float, int], Request] = OrderedQueue()
        self.first_deadline: float | None = None

    def add(self, request: Request) -> None:
        """Its sequences wait already."""
        self.requests[request.id] = request
        if request.deadline is not None:
            self._deadlines.push(_deadline_key(request), request)
            self._note_first_deadline()
        if request.stop_ids:
            self.stop_ids.add(request.stop_ids)

    def _note_first_deadline(self) -> None:
        key = self._deadlines.first_key()
        self.first_deadline = None if key is None else key[0]

    def end_overdue(self, now: float) -> list[Output]:
        """Ends the requests whose deadline has passed."""
        outputs: list[Output] = []
        while (key := self._deadlines.first_key()) is not None and key[0] <= now:
            request = self._deadlines.first()
            if request is not None:
                outputs += self.end_request(request, "deadline", now)
        return outputs

    def end_request(
        self, request: Request, finish: str, now: float, error_code: str = "", error: str = ""
    ) -> list[Output]:
        """Ends every continuation that has not ended."""
        return [
            self.end(Output(sequence, error_code=error_code, error=error), finish, now)
            for sequence in request.sequences
            if not sequence.finish
        ]

    def end(self, output: Output, finish: str, now: float) -> Output:
        """The one way out: a sequence ends here, once, and gives back all it has."""
        sequence, request = output.sequence, output.sequence.request
        output.known = known = self._running.length(sequence)
        if finish in ("stop", "length"):
            self._running.note_length(request, known)
        if sequence.row != NO_ROW:
            self._running.stop(sequence)
        else:
            self._waiting.remove(sequence)
            self._running.parked.pop(sequence.admission, None)
        sequence.tokens = b""
        sequence.finish = output.finish = finish
        request.unfinished -= 1
        self._admission.note_end(request, now)
        if not request.unfinished:
            self._forget(request)
        return output

    def _forget(self, request: Request) -> None:
        del self.requests[request.id]
        if request.deadline is not None:
            self._deadlines.remove(_deadline_key(request))
            self._note_first_deadline()
        if request.stop_ids:
            self.stop_ids.remove(request.stop_ids)
        self._running.tally.finish(request.tenant)
        self.finished += 1


def _deadline_key(request: Request) -> tuple[float, int]:
    return request.deadline or 0.0, request.sequences[0].order
