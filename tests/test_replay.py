"""What was recorded decides the same again, and whatever does not is named."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from tests.corekit import CONFIG, DRAWN_SEED, Rig
from tests.policykit import ChaosPolicy
from tests.test_core_machine import CoreMachine, configs
from treadle import LLM, SamplingParams
from treadle.errors import ConfigError, EventLogError, Overloaded, ProtocolError
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.event_log import Added, AnyEvent, Applied, Event, EventReader, EventWriter, Opened, Planned
from treadle.scheduler.policies import Policy, Ticket
from treadle.scheduler.recording import RecordedCore, config_to_log, plan_digest
from treadle.scheduler.replay import replay
from treadle.scheduler.request import Outputs
from treadle.scheduler.simulation import costs_from_log
from treadle.scheduler.simulation.recorded import read_event_log
from treadle.transport.codec import pack
from treadle.transport.messages import RowStart, StepPlan, StepResult, Submit

from .conftest import OWN


class RecordedRig(Rig):
    """A rig whose core writes down what happens."""

    def __init__(self, path: Path, config: CoreConfig = CONFIG, policy: Policy | None = None) -> None:
        super().__init__(config)
        self.path = path
        self.writer = EventWriter(path)
        self.core = RecordedCore(config, lambda: DRAWN_SEED, self.writer, policy)  # type: ignore[assignment]

    def _check_shape(self, plan: StepPlan) -> None:
        """Looks into the core itself, which is another one here."""


@pytest.fixture
def rig(tmp_path: Path) -> RecordedRig:
    """Some of everything has happened."""
    rig = RecordedRig(tmp_path / "log", replace(CONFIG, max_waiting_requests=2))
    rig.add("a", [1, 2, 3], max_tokens=20)
    rig.add("b", [4, 5], max_tokens=30, n=2, seed=5)
    with pytest.raises(Overloaded):
        rig.add("c", [1], n=8)
    rig.step()
    rig.add("d", [1, 2, 3], timeout=3.0, max_tokens=None)
    rig.step()
    rig.abort("b", 1)
    rig.must_plan()
    with pytest.raises(ProtocolError):
        rig.core.apply(msgspec.structs.replace(rig.execute(), step=77), 0.0)
    rig.now = 9.0
    rig.reset()
    rig.step()
    rig.add("e", [9], max_tokens=None)
    rig.take(rig.core.fail_all("gone", "it is over", rig.now))
    rig.writer.close()
    return rig


def change(rig: RecordedRig, which: Callable[[AnyEvent], AnyEvent]) -> Path:
    """The log with other events."""
    path = rig.path.with_suffix(".changed")
    path.unlink(missing_ok=True)
    writer = EventWriter(path)
    for event in EventReader(rig.path):
        writer.write(which(event))
    writer.close()
    return path


def test_everything_that_can_happen_replays(rig: RecordedRig) -> None:
    seen: list[str] = []
    report = replay(rig.path, check=True, observer=lambda event, decision: seen.append(type(event).__name__))
    assert report.difference is None and report.tail is None and report.good
    assert (report.cores, report.requests, report.steps, report.events) == (1, 4, 3, len(seen))
    assert {"Opened", "Added", "Aborted", "Planned", "Applied", "WasReset", "FailedAll"} <= set(seen)


def test_whole_numbers_where_floats_belong_replay(tmp_path: Path) -> None:
    """A program writes `temperature=0`; the log, and whoever decodes it, has 0.0."""
    rig = RecordedRig(tmp_path / "log")
    rig.add("a", [1, 2], temperature=0, top_p=1, presence_penalty=1, logit_bias={5: -100}, timeout=50, max_tokens=3)
    rig.drain()
    rig.writer.close()
    report = replay(rig.path)
    assert report.difference is None and report.good and report.steps


def test_seeds_that_were_drawn_are_in_the_log(rig: RecordedRig) -> None:
    added = {event.submit.id: event.seeds for event in EventReader(rig.path) if isinstance(event, Added)}
    assert added == {"a": [7], "b": [], "c": [], "d": [7], "e": [7]}

    def without(event: AnyEvent) -> AnyEvent:
        return msgspec.structs.replace(event, seeds=[]) if isinstance(event, Added) else event

    difference = replay(change(rig, without)).difference
    assert difference is not None and str(difference).startswith("event 1: Added.seeds is [0], the log has [];")


def test_the_first_difference_is_named(rig: RecordedRig) -> None:
    def other_tokens(event: AnyEvent) -> AnyEvent:
        if isinstance(event, Applied) and event.result.step == 1:
            changed = bytearray(event.result.tokens)
            changed[0] ^= 1
            return msgspec.structs.replace(event, result=msgspec.structs.replace(event.result, tokens=bytes(changed)))
        return event

    difference = replay(change(rig, other_tokens)).difference
    assert difference is not None and "Applied.outputs.tokens is " in difference.what
    assert "a/0 [" in difference.decision and "b/0 [" in difference.decision

    def other_budget(event: AnyEvent) -> AnyEvent:
        if isinstance(event, Opened):
            return msgspec.structs.replace(event, config={**event.config, "max_num_batched_tokens": 2})
        return event

    difference = replay(change(rig, other_budget)).difference
    assert difference is not None and "Planned.plan.start" in difference.what
    assert difference.decision == "step 0, starts [row 0 with 3 tokens], tokens by row [0:2]"

    def no_refusal(event: AnyEvent) -> AnyEvent:
        return msgspec.structs.replace(event, raised="") if isinstance(event, Added) else event

    difference = replay(change(rig, no_refusal)).difference
    assert difference is not None and "Added.raised is 'Overloaded: " in difference.what


def test_a_torn_log_replays_up_to_there(rig: RecordedRig) -> None:
    whole = replay(rig.path).events
    rig.path.write_bytes(rig.path.read_bytes()[:-1])
    report = replay(rig.path)
    assert report.good and report.events == whole - 1
    assert report.tail is not None and "the last event was cut off" in str(report.tail)
    data = bytearray(rig.path.read_bytes())
    data[len(data) // 2] ^= 16
    rig.path.write_bytes(data)
    report = replay(rig.path)
    assert not report.good and report.difference is None and "damaged" in str(report.tail)


def test_configurations_that_are_not_ours_are_refused(rig: RecordedRig) -> None:
    def config(**changes: object) -> Path:
        def one(event: AnyEvent) -> AnyEvent:
            if isinstance(event, Opened):
                return msgspec.structs.replace(event, config={**event.config, **changes})
            return event

        return change(rig, one)

    with pytest.raises(EventLogError, match="unknown to this program: warp_speed"):
        replay(config(warp_speed=9))
    with pytest.raises(EventLogError, match="num_blocks=0"):
        replay(config(num_blocks=0))
    path = rig.path.with_suffix(".headless")
    writer = EventWriter(path)
    writer.write(Planned(0.0, None))
    writer.close()
    with pytest.raises(EventLogError, match="does not begin with the configuration"):
        replay(path)


def test_an_object_in_the_configuration_is_refused_at_the_start() -> None:
    odd = replace(CONFIG, eos_token_ids=(object(),))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be written down"):
        config_to_log(odd)


class _Broken:
    def write(self, event: Event) -> None:
        raise RuntimeError("the sink is broken")


def test_a_sink_that_raises_is_not_taken_for_the_core() -> None:
    with pytest.raises(RuntimeError, match="the sink"):
        RecordedCore(CONFIG, lambda: 1, _Broken())


class RecordedMachine(CoreMachine):
    """Whatever hypothesis finds to do is recorded, and replays."""

    @initialize(config=configs, chaos=st.sampled_from([None, None, 1, 2]))
    def begin(self, config: CoreConfig, chaos: int | None) -> None:
        super().begin(config, chaos)
        self.policy = None if chaos is None else partial(ChaosPolicy, chaos)
        path = OWN / "recorded"
        path.unlink(missing_ok=True)
        self.rig = RecordedRig(path, config, None if self.policy is None else self.policy())

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        self.rig.drain()
        assert isinstance(self.rig, RecordedRig)
        self.rig.writer.close()
        report = replay(self.rig.path, own_policy=self.policy)
        assert report.difference is None and report.tail is None and report.events


RecordedMachine.TestCase.settings = settings(
    max_examples=20,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRecordedMachine = RecordedMachine.TestCase


class Backwards(Policy):
    """Last come, first served."""

    name = "backwards"

    def key(self, ticket: Ticket, now: float) -> float:
        return -float(ticket.number)


def test_a_policy_object_is_replayed_with_the_same_object_and_not_without(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "log")
    core = RecordedCore(replace(CONFIG, max_num_seqs=1), lambda: 1, writer, Backwards())
    for name in "abc":
        core.add(Submit(id=name, tokens=pack([1, 2]), params=SamplingParams(max_tokens=1, seed=1)), 0.0)
    now = 0.0
    while (plan := core.plan(now)) is not None:
        now += 0.25
        core.apply(StepResult(plan.step, 0, 0, pack([5]), 0), now, 0.25)
    writer.close()
    with pytest.raises(EventLogError, match="policy object, 'backwards'"):
        replay(tmp_path / "log")
    ends: list[str] = []

    def note(event: AnyEvent, decision: object) -> None:
        if isinstance(decision, Outputs):
            ends.extend(output.sequence.request.id for output in decision.finished)

    assert replay(tmp_path / "log", own_policy=Backwards, observer=note).good and ends == ["c", "b", "a"]
    difference = replay(tmp_path / "log", own_policy=Policy).difference
    assert difference is not None and str(difference).endswith("now it decides: a/0 [5] length")
    with pytest.raises(ConfigError, match="what makes a policy is allowed"):
        replay(tmp_path / "log", own_policy=Backwards())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="own_policy made None, which is no policy"):
        replay(tmp_path / "log", own_policy=lambda: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(EventLogError, match="known to a program only"):
        read_event_log(tmp_path / "log")
    assert read_event_log(tmp_path / "log", own_policy=Backwards).outputs.tolist() == [1, 1, 1]
    assert costs_from_log(tmp_path / "log", own_policy=Backwards).step > 0


def command(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "treadle", "replay", str(path), *flags]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


@pytest.mark.asyncio
async def test_a_service_is_recorded_through_the_loss_of_an_engine(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "log"
    options = {"dtype": "float32", "event_log": str(path), "max_num_seqs": 4, "num_blocks": 64}
    async with LLM(str(tiny), **options) as llm:
        streams = [llm.generate("ab" * i, SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(1, 7)]
        await anext(streams[0])
        os.kill(llm.engine_pids[0], signal.SIGKILL)
        await streams[1].aclose()
        await asyncio.gather(*(stream.final() for stream in [streams[0], *streams[2:]]))
    report = replay(path, check=True)
    assert report.good and report.tail is None, report
    assert report.requests == 6 and report.steps > 40
    async with LLM(str(tiny), **options) as llm:  # another run of the service, behind the first
        await llm.generate("again", SamplingParams(max_tokens=3)).final()
    shown = await asyncio.to_thread(command, path, "--check")
    assert shown.returncode == 0 and "of 2 runs, 7 requests" in shown.stdout, shown.stderr


def test_the_command_says_what_differs(rig: RecordedRig) -> None:
    def other(event: AnyEvent) -> AnyEvent:
        if isinstance(event, Added) and event.submit.id == "d":
            submit = Submit(id="d", tokens=pack([9, 9]), params=event.submit.params)
            return msgspec.structs.replace(event, submit=submit)
        return event

    done = command(change(rig, other))
    assert done.returncode == 1 and "Planned.plan.start is " in done.stderr
    other_version = rig.path.with_suffix(".v9")
    other_version.write_bytes(b"treadle-events\x09\x00")
    done = command(other_version)
    assert done.returncode == 2 and "EventLogError" in done.stderr and "version 9" in done.stderr
    assert command(rig.path.with_suffix(".none")).returncode == 2


def test_every_part_of_a_plan_is_in_its_digest() -> None:
    start = RowStart(0, 1, 0, b"abcd", b"efgh", SamplingParams(), 1, b"")
    plan = StepPlan(3, b"abcd", [start], b"abcd", b"efgh", b"ijkl", b"mnop")
    changes: dict[str, object] = {
        "step": 4,
        "release": b"abce",
        "start": [msgspec.structs.replace(start, seed=2)],
        "grow_rows": b"abce",
        "grow_blocks": b"efgi",
        "rows": b"ijkm",
        "counts": b"mnoq",
        "guided": b"abcd",
        "copy_out": b"abcd",
        "copy_in": b"abcd",
    }
    assert set(changes) == set(StepPlan.__struct_fields__)
    for name, value in changes.items():
        assert plan_digest(msgspec.structs.replace(plan, **{name: value})) != plan_digest(plan), name
