"""Many replicas: who gets what, the same results in any number of processes, and the report."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from treadle.commands import run
from treadle.errors import ConfigError, ServiceError
from treadle.scheduler.cost_model import StepCosts
from treadle.scheduler.policies import Policy, Ticket
from treadle.scheduler.simulation import Fleet, Goals, Workload, build_report, simulate
from treadle.scheduler.simulation.fleet import FleetProgress, Part
from treadle.scheduler.simulation.plots import check_plots
from treadle.scheduler.simulation.report import spread
from treadle.scheduler.simulation.routing import route
from treadle.scheduler.simulation.workload import Process, draw_workload, make_workload

from .simkit import CONFIG, SECOND, config, random_work, work

QUICK = StepCosts(step=0.01, prefill_token=0.001)


def report(workload: Workload, goals: Goals | None = None, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {"config": CONFIG, "costs": SECOND, **changes}
    fleet = Fleet(**values)  # type: ignore[arg-type]
    return build_report(fleet, workload, simulate(fleet, workload), goals or Goals())


def test_the_report_of_two_requests_by_hand() -> None:
    """[0, 1] prompt of the first, [1, 2] its second token, [2, 3] its third and the other prompt, [3, 4] the rest."""
    told = report(work((0.0, 4, 3), (0.5, 4, 2)), Goals(ttft=2.0, tpot=1.0))
    assert told["requests"] == {"offered": 2, "finished": 2, "ends": {"length": 2}}
    assert told["seconds"] == 4.0
    assert told["throughput"] == {"requests": 0.5, "input_tokens": 2.0, "output_tokens": 1.25}
    assert told["ttft"] == {"mean": 1.75, "p50": 1.75, "p90": 2.35, "p95": 2.425, "p99": 2.485, "max": 2.5}
    assert told["tpot"] == dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"), 1.0)
    assert told["end_to_end"]["max"] == 3.5  # type: ignore[index]
    assert told["goodput"] == {
        "goals": {"ttft": 2.0, "tpot": 1.0},
        "requests": 1,
        "share": 0.5,
        "per_second": 0.25,
    }
    assert told["engine"] == {"steps": 4, "busy": 1.0, "rows": 1.25}
    assert "tenants" not in told and "replicas" not in told


def test_tenants_replicas_and_the_sum_of_timelines() -> None:
    workload = work((0.0, 4, 3), (0.0, 4, 9), tenant=[1, 0], tenants=("a", "b"))
    told = report(workload, replicas=2, routing="round-robin")
    tenants, timeline = told["tenants"], told["timeline"]
    assert isinstance(tenants, dict) and tenants["a"]["ttft"]["max"] == tenants["b"]["ttft"]["max"] == 1.0
    assert [replica["requests"] for replica in told["replicas"]] == [1, 1]  # type: ignore[attr-defined]
    assert isinstance(timeline, dict)
    at = [round(second / timeline["every"]) for second in (2, 5, 8)]
    assert [timeline["running"][i] for i in at] == [2, 1, 1]
    assert timeline["generated"][-1] == 3 + 8, "the last token comes at the very end"


def test_nothing_finished_is_said_and_not_a_crash() -> None:
    told = report(work((0.0, 64, 1)))
    assert told["requests"]["ends"] == {"prompt_too_long": 1} and told["ttft"] is None  # type: ignore[index]
    assert spread(np.array([np.nan])) is None


def test_round_robin_and_least_loaded() -> None:
    workload = work((0.0, 4, 50), (1.0, 4, 2), (2.0, 4, 2), (8.0, 4, 2))
    assert route(workload, 2, "round-robin", CONFIG, SECOND).tolist() == [0, 1, 0, 1]
    assert route(workload, 2, "least-loaded", CONFIG, SECOND).tolist() == [0, 1, 0, 1]
    assert route(workload, 3, "least-loaded", CONFIG, SECOND).tolist() == [0, 1, 2, 1], "the router thinks 1 is done"
    assert route(workload, 1, "least-loaded", CONFIG, SECOND).tolist() == [0, 0, 0, 0]
    with pytest.raises(ConfigError, match="round-robin, least-loaded, prefix-affinity"):
        route(workload, 2, "random", CONFIG, SECOND)


def test_prefix_affinity_keeps_a_prefix_on_its_replica_until_it_is_too_much() -> None:
    prefixes = [5, 6, 5, 6, -1, 5]
    workload = make_workload(np.arange(6) * 0.01, 8, 50, prefix=prefixes, prefix_tokens=4)
    assert route(workload, 3, "prefix-affinity", CONFIG, SECOND).tolist() == [0, 1, 0, 1, 2, 0]
    crowd = make_workload(np.arange(40) * 0.01, 8, 50, prefix=5, prefix_tokens=4)
    counts = np.bincount(route(crowd, 3, "prefix-affinity", CONFIG, SECOND))
    assert counts.min() > 5, "one prefix does not keep the whole fleet waiting for one replica"


def test_affinity_is_worth_it() -> None:
    process = Process(rate=20, requests=400, prefixes=40, prefix_tokens=32)
    workload = draw_workload([(8, 4)], process)
    hits = {
        rule: report(workload, replicas=4, routing=rule, costs=QUICK)["cache"]["hit_rate"]  # type: ignore[index]
        for rule in ("round-robin", "prefix-affinity")
    }
    assert hits["prefix-affinity"] > hits["round-robin"] + 0.1


def test_the_same_in_any_number_of_processes_and_again() -> None:
    workload = random_work(4, 80, 30, prefixes=(-1, 0, 1))
    told = [report(workload, replicas=3, jobs=jobs) for jobs in (1, 2, 1)]
    assert json.dumps(told[0]) == json.dumps(told[1]) == json.dumps(told[2])
    assert told[0] != report(random_work(5, 80, 30), replicas=3)


def test_progress_comes_from_the_processes() -> None:
    workload = draw_workload([(8, 40)], Process(rate=1, requests=800))
    seen: list[tuple[int, float, int]] = []
    fleet = Fleet(config=CONFIG, costs=SECOND, replicas=2, jobs=2)
    simulate(fleet, workload, lambda *told: seen.append(told))
    assert {replica for replica, _, _ in seen} == {0, 1} and all(count for _, _, count in seen)


def test_errors_of_a_process_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(config=CONFIG, costs=SECOND, replicas=2, jobs=2)
    workload = random_work(4, 8, 8)
    wrong = Fleet(config=CONFIG, costs=StepCosts(step=-1.0), replicas=2, jobs=2, routing="round-robin")
    with pytest.raises(ConfigError, match="step=-1"):
        simulate(wrong, workload)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ServiceError, match="ended with code 1"):
        simulate(fleet, workload)


@pytest.mark.parametrize(
    "wrong",
    [{"replicas": 0}, {"jobs": 0}, {"overhead": -1.0}, {"overhead": float("nan")}, {"overhead": 1e300}],
)
def test_bad_fleets_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"at least 1|must be from 0 to 1,000,000,000 seconds"):
        Fleet(config=CONFIG, costs=SECOND, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="goal for ttft"):
        Goals(ttft=-1)
    with pytest.raises(ConfigError, match="policy='fair': what makes a policy is allowed"):
        Fleet(config=CONFIG, costs=SECOND, policy="fair")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--requests 1 --replicas 2000000000", "replicas=2000000000: a simulation may have at most 65536"),
        ("--requests 1 --max-num-seqs 100000000000", "max_num_seqs=100000000000: "),
        ("--requests 1 --num-blocks 1000000000000", "num_blocks=1000000000000: "),
        ("--requests 1 --max-model-len 10000000000", "max_model_len=10000000000: "),
        ("--requests 1 --block-size 1000000000", "block_size=1000000000: "),
        ("--requests 1 --vocab-size 1000000000000", "vocab_size=1000000000000: "),
        ("--requests 1 --prefixes 2 --prefix-tokens 99999999999", "prefix_tokens=99999999999: "),
        ("--requests 1 --prefixes 99999999999999999999", "prefixes=99999999999999999999: "),
        ("--requests 100000000000", "requests=100000000000: "),
        ("--requests 1 --seconds 1e12", "seconds=1000000000000.0: a simulation may have at most 1000000000"),
        ("--rate 1e12 --seconds 1e6", "rate times seconds=1e+18: a simulation may have at most 100000000"),
        ("--requests 1 --cv 1e200", "cv=1e+200: "),
        ("--requests 1 --cv 1e-200", "numbers that are too large together"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_in_one_line(
    flags: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_text("[1, 1]\n")
    assert run(["simulate", "--lengths", str(tmp_path / "x"), "--rate", "1", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("treadle: ConfigError: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--trace x --rate 2 --prefix-tokens 0", "--rate, --prefix-tokens: of --lengths; --trace says itself"),
        ("--event-log x --seed 1", "--seed: of --lengths; --event-log says itself"),
        ("--lengths x --rate 1 --requests 2 --json missing/a.json", "missing/a.json: missing is not a directory"),
        ("--lengths x --rate 1 --requests 2 --save-costs .", ". is a directory; allowed is a file's name"),
    ],
)
def test_options_that_can_do_nothing_are_refused_before_the_work(
    flags: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("treadle.simulating.simulate", lambda *_: pytest.fail("it was simulated"))
    (tmp_path / "x").write_text("[1, 1]\n")
    assert run(["simulate", *flags.split()]) == 2
    assert says in capsys.readouterr().err


def test_a_simulating_process_that_gets_no_memory_says_so_too(tmp_path: Path) -> None:
    """Each of the two sizes is allowed, and together they are 4 TiB of rows."""
    (tmp_path / "x").write_text("[1, 1]\n")
    sizes = ("--max-num-seqs", 65_536, "--max-model-len", 1 << 24)
    flags = ("--lengths", tmp_path / "x", "--rate", 1, "--requests", 4, "--replicas", 2, "--jobs", 2, *sizes)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36)); "
    command = limited + "from treadle.commands import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", command, "simulate", *map(str, flags)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "ConfigError: numbers that are too large together for a simulation: Unable to allocate" in done.stderr


class ShortFirst(Policy):
    """The shortest prompt first."""

    name = "short-first"

    def key(self, ticket: Ticket, now: float) -> float:
        return float(ticket.prompt_tokens)


def test_a_policy_of_ones_own_on_several_replicas() -> None:
    workload = work((0.0, 4, 2), (0.1, 9, 1), (0.2, 3, 1), (0.0, 4, 2), (0.1, 9, 1), (0.2, 3, 1))
    fleet = Fleet(config=config(max_num_seqs=1), costs=SECOND, replicas=2, jobs=2, policy=ShortFirst)
    for part in simulate(fleet, workload):
        first = np.frombuffer(part.result.first)
        assert first[2] < first[1], "the short one waited behind the long one"
    told = report(workload, config=config(max_num_seqs=1, policy="fcfs"))
    assert told["model"]["config"]["policy"] == "fcfs"  # type: ignore[index]


class Fails(Policy):
    name = "fails"

    def key(self, ticket: Ticket, now: float) -> float:
        raise RuntimeError("mine to fail")


def test_a_report_names_the_policy_that_ran_and_counts_its_failures() -> None:
    workload = work((0.0, 4, 2), (0.1, 9, 1), (0.2, 3, 1))
    told = report(workload, policy=Fails, replicas=2, routing="round-robin")
    assert told["model"]["config"]["policy"] == "fails"  # type: ignore[index]
    assert told["policy_errors"] == 3, "one for the key of each request"
    assert told["requests"]["ends"] == {"length": 3}, "the step goes on first come, first served"  # type: ignore[index]
    told = report(workload, policy=ShortFirst)
    assert (told["model"]["config"]["policy"], told["policy_errors"]) == ("short-first", 0)  # type: ignore[index]


# ── the command ──


def simulated(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "treadle", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_command_writes_the_same_report_for_the_same_seed(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("[20, 5]\n[9, 12]\n")
    flags = ("--lengths", lengths, "--rate", 30, "--requests", 50, "--num-blocks", 500, "--no-prefix-cache")
    first = simulated(*flags, "--seed", 3, "--json", tmp_path / "a.json", "--save-costs", tmp_path / "costs.json")
    assert first.returncode == 0, first.stderr
    assert "treadle: simulated " in first.stderr and not first.stdout
    again = simulated(
        *flags, "--seed", 3, "--json", tmp_path / "b.json", "--costs", tmp_path / "costs.json", "--jobs", 1
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    told = json.loads((tmp_path / "a.json").read_bytes())
    assert told["requests"]["finished"] == 50 and told["model"]["config"]["num_blocks"] == 500
    assert not told["model"]["config"]["prefix_cache"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "one of --trace, --lengths, --event-log"),
        (("--lengths", "x"), "give their --rate"),
        (("--trace", "/nowhere"), "No such file"),
        (("--event-log", "/nowhere"), "is not a file"),
        (("--lengths", "x", "--rate", 1, "--requests", 1, "--costs", "x", "--costs-from", "x"), "one of them"),
    ],
)
def test_the_command_says_what_is_wrong(
    flags: tuple[object, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_text("[1, 1]\n")
    assert run(["simulate", *(str(tmp_path / "x") if value == "x" else str(value) for value in flags)]) == 2
    assert says in capsys.readouterr().err


def test_the_command_says_that_the_policy_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_text("[4, 2]\n")
    command = ["simulate", "--lengths", str(tmp_path / "x"), "--rate", "1", "--requests", "2"]
    assert run(command) == 0
    assert "policy failed" not in capsys.readouterr().err

    def with_own(fleet: Fleet, workload: Workload, told: FleetProgress) -> list[Part]:
        return simulate(replace(fleet, policy=Fails), workload, told)

    monkeypatch.setattr("treadle.simulating.simulate", with_own)
    assert run(command) == 0
    said = "the policy failed 2 times, the last: policy 'fails': key raised RuntimeError: mine to fail"
    assert said in capsys.readouterr().err


def test_plots_without_matplotlib_are_refused_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("treadle.scheduler.simulation.plots.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"treadle\[plots\]"):
        check_plots(tmp_path)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plots(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from treadle.scheduler.simulation.plots import write_plots

    workload = work((0.0, 4, 3), (0.5, 64, 2), (0.5, 4, 1))
    fleet = Fleet(config=config(), costs=SECOND)
    parts = simulate(fleet, workload)
    files = write_plots(tmp_path, kind, workload, parts, build_report(fleet, workload, parts, Goals(1.0, 1.0)))
    assert [path.name for path in files] == [f"latency.{kind}", f"timeline.{kind}"]
    assert all(path.stat().st_size > 5000 for path in files)
