"""What comes: traces, random arrivals, and the requests of an event log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from treadle.commands import run
from treadle.errors import ConfigError, EventLogError
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.event_log import EventWriter, Tail
from treadle.scheduler.recording import RecordedCore
from treadle.scheduler.replay import replay
from treadle.scheduler.simulation.costs import PRESETS, costs_from_log, step_costs
from treadle.scheduler.simulation.prompts import offers
from treadle.scheduler.simulation.recorded import read_event_log
from treadle.scheduler.simulation.replica import Replica
from treadle.scheduler.simulation.result import ReplicaResult
from treadle.scheduler.simulation.workload import (
    Process,
    Workload,
    draw_workload,
    make_workload,
    read_lengths,
    read_trace,
)
from treadle.transport.codec import unpack

from .simkit import config, random_work, work

TRACE = """
{"arrival": 2.5, "input": 8, "output": 3, "tenant": "b", "prefix": "doc", "prefix_tokens": 5, "timeout": 9}

{"arrival": 1, "input": 4, "output": 1, "tenant": "a", "prefix": "doc", "priority": -2}
{"arrival": 2.5, "input": 6, "output": 2, "tenant": "b", "prefix": "", "prefix_tokens": 0}
"""


@pytest.mark.parametrize("encoding", ["", "\ufeff"], ids=["plain", "marked as UTF-8"])
def test_a_trace_is_read_and_sorted(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(encoding + TRACE.lstrip())
    read = read_trace(path)
    assert read.arrival.tolist() == [1.0, 2.5, 2.5] and read.inputs.tolist() == [4, 8, 6]
    assert [read.tenants[i] for i in read.tenant] == ["a", "b", "b"]
    assert read.prefix.tolist() == [0, 0, -1] and read.prefix_tokens.tolist() == [3, 5, 0]
    assert read.priority.tolist() == [-2, 0, 0] and read.timeout.tolist() == [0, 9, 0]
    assert read.take(np.array([2, 0])).inputs.tolist() == [6, 4]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 3: "),
        ('{"arrival": 0, "input": 1}', "line 3: .*output"),
        ('{"arrival": 0, "input": 1, "output": 1, "tennant": "x"}', "line 3: .*tennant"),
        ('{"arrival": -1, "input": 1, "output": 1}', "line 3: arrival"),
        ('{"arrival": 1e300, "input": 1, "output": 1}', "line 3: arrival and timeout from 0 to 1,000,000,000 seconds"),
        ('{"arrival": 0, "input": 1, "output": 1, "timeout": 1e300}', "line 3: arrival and timeout from 0 to 1,000"),
        ('{"arrival": 0, "input": 3, "output": 1, "prefix_tokens": 2}', "line 3: prefix_tokens without a prefix"),
        ('{"arrival": 0, "input": 0, "output": 1}', "line 3: "),
        (
            '{"arrival": 0, "input": 3, "output": 1, "prefix": "x", "prefix_tokens": 4}',
            "trace.jsonl, line 3: prefix_tokens=4: it must be from 0 to the 3 tokens",
        ),
        ('{"arrival": 0, "input": 3, "output": 1, "prefix": "x", "prefix_tokens": -1}', "line 3: prefix_tokens=-1: "),
        ('{"arrival": 0, "input": 99999999999999, "output": 1}', "line 3: input and output from 1 to 16777216"),
        ('{"arrival": 0, "input": 1, "output": 16777217}', "line 3: input and output from 1 to 16777216"),
        ('{"arrival": 0, "input": 1, "output": 99999999999999999999999}', "line 3: "),
        (
            '{"arrival": 0, "input": 1, "output": 1, "priority": 99999999999}',
            r"trace.jsonl, line 3: priority=99999999999: it must be in \[-1048576, 1048576\]",
        ),
        ('{"arrival": 0, "input": 1, "output": 1, "priority": -1048577}', "line 3: priority=-1048577: "),
    ],
)
def test_bad_traces_are_refused(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"arrival": 0, "input": 1, "output": 1}\n\n' + line)
    with pytest.raises(ConfigError, match=says):
        read_trace(path)


@pytest.mark.parametrize("arrival", [-1.0, float("nan"), float("inf"), 1e10])
def test_arrivals_that_no_trace_may_have_are_refused_in_a_program_too(arrival: float) -> None:
    with pytest.raises(ConfigError, match="arrivals must be seconds from 0 to 1,000,000,000"):
        make_workload([0.0, arrival], 1, 1)


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    with pytest.raises(ConfigError, match="empty has no requests"):
        read_trace(path)
    with pytest.raises(ConfigError, match="is empty"):
        read_lengths(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_lengths(tmp_path / "nowhere")
    path.write_text("[1, 2]\n[3]\n")
    with pytest.raises(ConfigError, match="line 2"):
        read_lengths(path)
    path.write_text("[1, 0]\n")
    with pytest.raises(ConfigError, match="line 1: input and output from 1"):
        read_lengths(path)
    path.write_text("[1, 2]\n[99999999999999, 2]\n")
    with pytest.raises(ConfigError, match="line 2: input and output from 1 to 16777216"):
        read_lengths(path)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_the_rate_and_the_burstiness(cv: float) -> None:
    drawn = draw_workload([(1, 1)], Process(rate=50, cv=cv, requests=40_000, seed=3))
    gaps = np.diff(drawn.arrival)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_a_process_ends_at_its_time_and_is_the_same_for_the_same_seed() -> None:
    def draw(seed: int) -> Workload:
        return draw_workload([(5, 1), (9, 2)], Process(rate=10, seconds=60, seed=seed, prefixes=3, prefix_tokens=4))

    one, again, other = draw(1), draw(1), draw(2)
    assert all((one.columns()[name] == again.columns()[name]).all() for name in one.columns())
    assert one.arrival.max() < 60 and 480 < len(one) < 720 and len(other) != len(one)
    assert set(one.inputs.tolist()) == {9, 13} and set(one.prefix.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rate": 0.0, "requests": 1}, r"rate=0\.0: requests per second, more than 0"),
        ({"rate": -1.0, "requests": 1}, r"rate=-1\.0: requests per second, more than 0"),
        ({"rate": 1.0, "requests": 1, "prefixes": 3}, "prefixes and prefix_tokens: give both"),
        ({"rate": 1.0, "requests": 1, "prefix_tokens": 3}, "prefixes and prefix_tokens: give both"),
        ({"rate": float("nan"), "requests": 1}, "rate=nan"),
        ({"rate": 1.0}, "no end"),
        ({"rate": 1.0, "cv": -1.0, "requests": 1}, "cv=-1"),
        ({"rate": 1.0, "requests": -1}, "requests=-1: a whole number from 0"),
        ({"rate": 1e-9, "seconds": 1e10}, r"seconds=10000000000\.0: a simulation may have at most 1000000000"),
    ],
)
def test_bad_processes_are_refused(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Process(**values)  # type: ignore[arg-type]


def test_bad_workloads_are_refused() -> None:
    for requests, says in (([(0.0, 0, 1)], "at least one token"), ([(float("inf"), 1, 1)], "arrivals")):
        with pytest.raises(ConfigError, match=says):
            work(*requests)
    for priority in ([1 << 31], np.array([-(1 << 40)]), [1 << 70]):
        with pytest.raises(ConfigError, match="32 bits"):
            work((0.0, 1, 1), priority=priority)
    with pytest.raises(ConfigError, match="no request arrives"):
        draw_workload([(1, 1)], Process(rate=0.001, cv=0.0, seconds=1))


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    prefixes = [-1, 0, 0, 1, 0]
    chosen = make_workload(range(5), [40, 40, 50, 40, 30], 1, prefix=prefixes, prefix_tokens=[0, 20, 24, 20, 30])
    prompts = [unpack(offer.prompt).tolist() for offer in offers(chosen, 1000)]
    assert [len(prompt) for prompt in prompts] == [40, 40, 50, 40, 30]
    assert prompts[1][:20] == prompts[2][:20] == prompts[4][:20] and prompts[2][:24] == prompts[4][:24]
    assert prompts[1][20:24] != prompts[2][20:24] and prompts[3][:4] != prompts[1][:4] != prompts[0][:4]
    assert all(0 <= token < 1000 for prompt in prompts for token in prompt)
    part = chosen.take(np.array([3, 2]))
    assert unpack(list(offers(part, 1000))[1].prompt).tolist() == prompts[2], (
        "a request has the same tokens on any replica"
    )


def test_step_costs_by_name_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_bytes(StepCosts(step=0.5).to_json())
    assert step_costs(str(path)) == StepCosts(step=0.5)
    preset = PRESETS["h100-llama-3.1-8b"]
    assert step_costs("h100-llama-3.1-8b") == preset
    with pytest.raises(ConfigError, match=r"a-abacus.*: h100-.*, or a JSON file"):
        step_costs("a-abacus")


# ── the way round: simulate, record it, learn from the record, simulate that ──

COSTS = StepCosts(step=4e-3, prefill_token=3e-4, decode_row=2e-4, context_token=1e-5, chunk_pair=1e-6)


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Workload, ReplicaResult]:
    """A log as a service with these costs would have written it, and what the log is about."""
    workload = random_work(5, 400, 30, prefixes=(-1, 0))
    workload = make_workload(workload.arrival / 40, workload.inputs, workload.outputs, prefix=workload.prefix)
    replica = Replica(config(), COSTS, workload)
    writer = EventWriter(tmp_path / "log")
    replica.core = RecordedCore(config(), lambda: 0, writer)  # type: ignore[assignment]
    result = replica.run()
    writer.close()
    return tmp_path / "log", workload, result


def test_a_log_gives_back_costs_requests_and_times(recorded: tuple[Path, Workload, ReplicaResult]) -> None:
    path, workload, result = recorded
    assert replay(path).good
    learned = costs_from_log(path)
    assert learned.step == pytest.approx(COSTS.step, rel=0.05)
    assert learned.prefill_token == pytest.approx(COSTS.prefill_token, rel=0.05)
    assert learned.context_token == pytest.approx(COSTS.context_token, rel=0.05)
    again = read_event_log(path)
    assert (again.inputs == workload.inputs).all() and (again.outputs == workload.outputs).all()
    assert again.arrival == pytest.approx(workload.arrival - workload.arrival[0])
    repeated = Replica(config(), learned, again).run()
    then = np.frombuffer(result.finish) - workload.arrival
    now = np.frombuffer(repeated.finish) - again.arrival
    assert np.median(now) == pytest.approx(np.median(then), rel=0.02)


def test_logs_without_steps_or_requests_are_refused(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "log")
    RecordedCore(config(), lambda: 0, writer)
    writer.close()
    with pytest.raises(ConfigError, match="no steps"):
        costs_from_log(tmp_path / "log")
    with pytest.raises(ConfigError, match="no requests"):
        read_event_log(tmp_path / "log")


def test_a_log_that_is_not_whole_is_told_of(
    recorded: tuple[Path, Workload, ReplicaResult], capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut-off end is said and the rest taken, as after a kill; of a damaged file nothing is."""
    path, workload, _ = recorded
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    tails: list[Tail] = []
    assert len(read_event_log(path, tails.append)) == len(workload)
    assert [tail.torn for tail in tails] == [True] and 0 < tails[0].offset < len(data) - 3
    command = [
        "simulate",
        "--event-log",
        str(path),
        "--costs-from",
        str(path),
        "--json",
        str(path.with_suffix(".json")),
    ]
    assert run(command) == 0
    assert capsys.readouterr().err.count(f"the last event was cut off at byte {tails[0].offset}") == 1
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    for read in (read_event_log, costs_from_log):
        with pytest.raises(EventLogError, match="log: the file is damaged at byte"):
            read(path)
    assert run(command) == 2
    assert "EventLogError: " in capsys.readouterr().err
