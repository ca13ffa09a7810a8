"""`treadle simulate`: the scheduler in virtual time, from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from treadle.errors import ConfigError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.event_log import EventReader, Opened, Tail
from treadle.scheduler.recording import config_from_log
from treadle.scheduler.simulation import (
    PRESETS,
    ROUTING,
    Fleet,
    Goals,
    Workload,
    build_report,
    costs_from_log,
    simulate,
    step_costs,
)
from treadle.scheduler.simulation.garbage import few_collections
from treadle.scheduler.simulation.plots import FORMATS, check_plots, write_plots
from treadle.scheduler.simulation.recorded import read_event_log
from treadle.scheduler.simulation.sizes import TOO_LARGE, too_large
from treadle.scheduler.simulation.workload import Process, draw_workload, read_lengths, read_trace

from .flags import SERVICE_HELP, flag

_PROGRESS_SECONDS = 2.0
_HELP = {
    "num_blocks": "of the KV cache, the null block included",
    "swap_blocks": "of host memory, for what the device gives up",
    "swap_out_seconds": "to move one block there",
    "swap_in_seconds": "to move one block back",
    "evict_ahead": "cached blocks that go at least when some have to; a 256th of all by default",
}
_DEFAULTS: dict[str, Any] = {"num_blocks": 26_000, "vocab_size": 32_768, "max_model_len": 8_192}
"""Of a core for Llama 3.1 8B in bfloat16 on 80 GB, where nothing else is said."""


def add_simulate_options(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("what comes (one of the first three)")
    work.add_argument("--trace", type=Path, metavar="FILE", help="JSON lines: arrival, input, output, tenant, prefix …")
    work.add_argument("--lengths", type=Path, metavar="FILE", help="JSON lines [input, output]; arrivals at random")
    work.add_argument("--event-log", type=Path, metavar="FILE", help="the requests that a service recorded")
    drawn = parser.add_argument_group("how --lengths come")
    drawn.add_argument("--rate", type=float, metavar="FLOAT", help="requests per second")
    drawn.add_argument("--cv", type=float, metavar="FLOAT", help=_CV)
    drawn.add_argument("--seconds", type=float, metavar="FLOAT", help="of arrivals")
    drawn.add_argument("--requests", type=int, metavar="INT", help="at most so many")
    drawn.add_argument("--seed", type=int, metavar="INT", help="of the arrivals (default 0)")
    drawn.add_argument("--prefixes", type=int, metavar="INT", help="groups that share a beginning")
    drawn.add_argument("--prefix-tokens", type=int, metavar="INT", help="tokens of that beginning")
    engine = parser.add_argument_group("who serves it")
    engine.add_argument("--costs", metavar="NAME", help=f"{', '.join(PRESETS)}, or a JSON file (default {_COSTS})")
    engine.add_argument("--costs-from", type=Path, metavar="FILE", help="learn the costs from this event log")
    engine.add_argument("--replicas", type=int, default=1, metavar="INT", help="schedulers (default %(default)s)")
    engine.add_argument("--routing", default="least-loaded", metavar="RULE", help=_RULES)
    engine.add_argument("--overhead", type=float, default=0.0, metavar="SECONDS", help="of the scheduler between steps")
    engine.add_argument("--jobs", type=int, default=_cores(), metavar="INT", help="processes (default: one a core)")
    _add_core_options(parser.add_argument_group("scheduler of each replica"))
    out = parser.add_argument_group("what is told")
    out.add_argument("--goal-ttft", type=float, default=0.0, metavar="SECONDS", help="service level: first token")
    out.add_argument("--goal-tpot", type=float, default=0.0, metavar="SECONDS", help="service level: each later token")
    out.add_argument("--json", type=Path, metavar="FILE", help="where to write the report with its timeline")
    out.add_argument("--plots", type=Path, metavar="DIRECTORY", help="where to draw plots; needs treadle[plots]")
    out.add_argument("--format", default=FORMATS[0], choices=FORMATS, help="of the plots (default %(default)s)")
    out.add_argument("--save-costs", type=Path, metavar="FILE", help="write the step costs that were used")
    parser.set_defaults(run=run_simulate)


_RULES = f"which replica gets a request: {', '.join(ROUTING)} (default %(default)s)"
_CV = "how bursty: deviation of the gaps over their mean, 1 is Poisson, 0 regular (default 1)"
_DRAWN = ("rate", "cv", "seconds", "requests", "seed", "prefixes", "prefix_tokens")
_COSTS = next(iter(PRESETS))


def run_simulate(options: argparse.Namespace) -> int:
    """Simulates, prints the report; how fast it was goes to standard error, so that the report is always the same."""
    try:
        return _simulate(options)
    except TOO_LARGE as error:
        raise too_large(error) from error


def _simulate(options: argparse.Namespace) -> int:
    if options.plots is not None:
        check_plots(options.plots)
    for path in (options.json, options.save_costs):
        if path is not None:
            _check_target(path)
    workload = _workload(options)
    goals = Goals(options.goal_ttft, options.goal_tpot)
    config = _core_config(options)
    fleet = Fleet(
        config=config,
        costs=_with_copies(_step_costs(options), config),
        replicas=options.replicas,
        routing=options.routing,
        overhead=options.overhead,
        jobs=options.jobs,
    )
    if options.save_costs is not None:
        _write(options.save_costs, fleet.costs.to_json() + b"\n")
    progress = _Progress(fleet.replicas, len(workload))
    with few_collections():
        parts = simulate(fleet, workload, progress.told)
    report = build_report(fleet, workload, parts, goals)
    progress.done(report["seconds"], sum(part.result.steps for part in parts))
    if errors := [part.result.policy_error for part in parts if part.result.policy_error]:
        count = report["policy_errors"]
        times = "once" if count == 1 else f"{count} times, the last"
        print(f"treadle: the policy failed {times}: {errors[-1]}", file=sys.stderr)
    if options.json is not None:
        _write(options.json, _json(report))
    else:
        sys.stdout.write(_json({name: part for name, part in report.items() if name != "timeline"}).decode())
    if options.plots is not None:
        for path in write_plots(options.plots, options.format, workload, parts, report):
            print(f"wrote {path}", file=sys.stderr)
    return 0


def _workload(options: argparse.Namespace) -> Workload:
    given = [name for name in ("trace", "lengths", "event_log") if vars(options)[name] is not None]
    if len(given) != 1:
        raise ConfigError("say what comes with one of --trace, --lengths, --event-log")
    drawn = {name: vars(options)[name] for name in _DRAWN if vars(options)[name] is not None}
    if options.lengths is None and drawn:
        flags = ", ".join(flag(name) for name in drawn)
        raise ConfigError(f"{flags}: of --lengths; {flag(given[0])} says itself what comes and when")
    if options.trace is not None:
        return read_trace(options.trace)
    if options.event_log is not None:
        return read_event_log(_existing(options.event_log), _tell_cut_off(options.event_log))
    if options.rate is None:
        raise ConfigError("--lengths says nothing of arrivals: give their --rate")
    return draw_workload(read_lengths(options.lengths), Process(**drawn))


def _step_costs(options: argparse.Namespace) -> StepCosts:
    if options.costs_from is None:
        return step_costs(options.costs or _COSTS)
    if options.costs is not None:
        raise ConfigError("--costs and --costs-from: give one of them")
    same = options.costs_from == options.event_log  # then it was told of already
    return costs_from_log(_existing(options.costs_from), None if same else _tell_cut_off(options.costs_from))


def _tell_cut_off(path: Path) -> Callable[[Tail], None]:
    return lambda tail: print(f"treadle: {path}: {tail}; what stands before it is taken", file=sys.stderr)


def _with_copies(costs: StepCosts, config: CoreConfig) -> StepCosts:
    """Where nothing is known of copies to host memory, what the ranks of that configuration have measured."""
    if costs.block_out or costs.block_in:
        return costs
    return msgspec.structs.replace(costs, block_out=config.swap_out_seconds, block_in=config.swap_in_seconds)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path} is not a file")
    return path


def _check_target(path: Path) -> None:
    """Before the work, which may take an hour. Raises ConfigError where a file cannot be written at its end."""
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; allowed is a file's name")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: {path.parent} is not a directory")


def _json(report: dict[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report)) + b"\n"


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


# ── the core's options: one flag per field of CoreConfig that has a command-line form ──


def _add_core_options(group: argparse._ArgumentGroup) -> None:
    for field, kind in _core_fields():
        default = _DEFAULTS.get(field.name, field.default)
        shape: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            shape = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            flag(field.name), dest=f"core_{field.name}", default=None, help=_shown(field.name, default), **shape
        )


def _shown(name: str, default: object) -> str:
    about = _HELP.get(name) or SERVICE_HELP.get(name, "")
    return f"{about} (default {default})".strip().replace("%", "%%")


def _core_fields() -> list[tuple[dataclasses.Field[Any], type]]:
    hints = typing.get_type_hints(CoreConfig)
    found = []
    for field in dataclasses.fields(CoreConfig):
        kinds = typing.get_args(hints[field.name]) if _is_union(hints[field.name]) else (hints[field.name],)
        plain = [kind for kind in kinds if kind in (bool, int, float, str)]
        if len(plain) == 1:
            found.append((field, plain[0]))
    return found


def _is_union(hint: object) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


def _core_config(options: argparse.Namespace) -> CoreConfig:
    """Of the recorded service where there is one; what is given on the command line goes first."""
    values = vars(options)
    given = {f.name: values[f"core_{f.name}"] for f, _ in _core_fields() if values[f"core_{f.name}"] is not None}
    if options.event_log is not None:
        return dataclasses.replace(_recorded_config(options.event_log), **given)
    return CoreConfig(**{**_DEFAULTS, **given})


def _recorded_config(path: Path) -> CoreConfig:
    opened = [event for event in EventReader(path) if isinstance(event, Opened)]
    if not opened:
        raise ConfigError(f"{path}: no run of a service in it")
    return config_from_log(opened[-1].config)


# ── how far it is ──


class _Progress:
    """A line on standard error every few seconds, for runs that take longer than that."""

    def __init__(self, replicas: int, requests: int) -> None:
        self._requests = requests
        self._came = [0] * replicas
        self._began = self._said = time.monotonic()

    def told(self, replica: int, seconds: float, came: int) -> None:
        self._came[replica] = came
        now = time.monotonic()
        if now - self._said < _PROGRESS_SECONDS:
            return
        self._said = now
        share = sum(self._came) / self._requests
        left = (now - self._began) * (1 - share) / share if share else 0.0
        print(
            f"treadle: {share:4.0%} of {self._requests} requests, replica {replica} at {seconds:.0f} s, "
            f"about {left:.0f} s left",
            file=sys.stderr,
        )

    def done(self, seconds: float, steps: int) -> None:
        took = max(time.monotonic() - self._began, 1e-9)
        print(
            f"treadle: simulated {seconds:.1f} s and {steps} steps in {took:.1f} s: "
            f"{seconds * len(self._came) / took:.0f} replica seconds per second",
            file=sys.stderr,
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0))
