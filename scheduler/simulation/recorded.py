"""The requests of an event log as a workload: the same arrivals, tokens and lengths, to be tried on another service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from treadle.errors import ConfigError
from treadle.scheduler.event_log import Added, AnyEvent, Opened
from treadle.scheduler.replay import Decision
from treadle.scheduler.request import Output, Outputs, Request, Sequence
from treadle.transport.messages import Submit

from .whole_log import CutOff, OwnPolicy, replay_whole
from .workload import Workload, make_workload


def read_event_log(path: Path, cut_off: CutOff | None = None, own_policy: OwnPolicy | None = None) -> Workload:
    """Every accepted request of the last run in the log, each continuation as one of its own.

    A request is as long as what it had brought when it ended, or when the log did, and at least one token. Raises
    ConfigError for a log without requests or that does not replay, EventLogError for one that is damaged. cut_off: is
    told where the last event is not whole. own_policy: as of `replay`, for a log recorded with a policy object.
    """
    collector = _Collector()
    report = replay_whole(path, collector.see, cut_off, own_policy)
    if report.difference is not None:
        raise ConfigError(f"{path} does not replay, so its requests cannot be known: {report.difference}")
    return collector.workload(path)


@dataclass(slots=True)
class _Offered:
    submit: Submit
    at: float
    tokens: int = 0


class _Collector:
    def __init__(self) -> None:
        self._offered: list[_Offered] = []
        self._open: dict[Sequence, _Offered] = {}

    def see(self, event: AnyEvent, decision: Decision) -> None:
        if isinstance(event, Opened):
            self._offered, self._open = [], {}
        elif isinstance(event, Added) and isinstance(decision, Request):
            for sequence in decision.sequences:
                offered = _Offered(event.submit, event.now)
                self._offered.append(offered)
                self._open[sequence] = offered
        elif isinstance(decision, Outputs):
            for sequence in decision.sequences:
                self._open[sequence].tokens += 1
            self._end(decision.others)
        elif isinstance(decision, list):
            self._end(decision)

    def _end(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._open[output.sequence].tokens += len(output.tokens)
            if output.finish:
                del self._open[output.sequence]

    def workload(self, path: Path) -> Workload:
        if not self._offered:
            raise ConfigError(f"{path}: no requests in its last run")
        begin = self._offered[0].at
        names = dict.fromkeys(offered.submit.tenant for offered in self._offered)
        tenants = {name: number for number, name in enumerate(names)}
        return make_workload(
            [offered.at - begin for offered in self._offered],
            [len(offered.submit.tokens) // 4 for offered in self._offered],
            [max(1, offered.tokens) for offered in self._offered],
            tenant=[tenants[offered.submit.tenant] for offered in self._offered],
            tenants=tuple(tenants),
            priority=[offered.submit.priority for offered in self._offered],
            timeout=[offered.submit.timeout for offered in self._offered],
            prompts=[offered.submit.tokens for offered in self._offered],
        )
