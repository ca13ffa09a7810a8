"""`treadle replay`: a recorded incident, again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from treadle.errors import ConfigError
from treadle.scheduler.replay import replay


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="event log that `treadle serve --event-log` wrote")
    parser.add_argument("--check", action="store_true", help="verify the scheduler's invariants after each event; slow")
    parser.set_defaults(run=run_replay)


def run_replay(options: argparse.Namespace) -> int:
    """0 when every decision is the same, 1 at the first difference and for a damaged file."""
    try:
        report = replay(options.file, check=options.check)
    except OSError as error:
        raise ConfigError(f"{options.file}: {error.strerror}") from error
    print(
        f"{report.events} events of {report.cores} runs, {report.requests} requests, {report.steps} steps: "
        f"{'the same decisions' if report.difference is None else 'up to there the same decisions'}"
    )
    for problem in (report.difference, report.tail):
        if problem is not None:
            print(f"treadle: {options.file}: {problem}", file=sys.stderr)
    return 0 if report.good else 1
