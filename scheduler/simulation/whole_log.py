"""An event log from which something is learned has to be whole: what stands before a damage is not what happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from treadle.errors import EventLogError
from treadle.scheduler.event_log import Tail
from treadle.scheduler.policies import Policy
from treadle.scheduler.replay import Observer, ReplayReport, replay

CutOff = Callable[[Tail], None]
"""Is told of a last event that is not whole, as a killed service leaves it: what stands before it counts."""

OwnPolicy = Callable[[], Policy]


def replay_whole(
    path: Path, observer: Observer, cut_off: CutOff | None = None, own_policy: OwnPolicy | None = None
) -> ReplayReport:
    """As `replay`. Raises EventLogError also for a file that is damaged."""
    report = replay(path, observer=observer, own_policy=own_policy)
    if report.tail is not None:
        if not report.tail.torn:
            raise EventLogError(f"{path}: {report.tail}")
        if cut_off is not None:
            cut_off(report.tail)
    return report
