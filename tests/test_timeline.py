"""The timeline of a live service: its form, and what it says beside what happened."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from treadle import Client, SamplingParams
from treadle.errors import InvalidRequest, Overloaded, ServiceClosed
from treadle.scheduler import timeline as recording
from treadle.scheduler.client_server import ClientServer
from treadle.scheduler.timeline import Recorder
from treadle.timeline import to_json
from treadle.transport.endpoints import read_keys, write_keys
from treadle.transport.messages import Abort, Timeline

from .faultkit import PROMPTS, Faulty, faulty, params

Event = dict[str, Any]


def read(text: bytes) -> list[Event]:
    """Its events, after a look at the form: Chrome's trace event format."""
    events: list[Event] = json.loads(text)["traceEvents"]
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    assert {e["ph"] for e in events} <= {"M", "X", "i", "C"}
    for event in events:
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and (event["pid"], event["tid"]) in named
        if event["ph"] == "i":
            assert event["s"] in ("t", "g") and event["ts"] >= 0
    for track in named:
        mine = (e for e in events if e["ph"] == "X" and track == (e["pid"], e["tid"]))
        slices = sorted((e["ts"], e["ts"] + e["dur"]) for e in mine)
        assert all(before[1] <= after[0] for before, after in pairwise(slices)), f"{track} overlaps"
    return events


def track(events: list[Event], name: str) -> list[Event]:
    [where] = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name" and e["args"]["name"] == name}
    return [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == where]


def record(rig: Faulty) -> Recorder:
    """Begins now; until the test says that it is over."""
    recorder = Recorder(perf_counter(), rig.service.observers.telemetry.lives.rows)
    rig.service.observers.recorder = recorder
    return recorder


def sums(events: list[Event], what: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for event in events:
        if event["ph"] == "X" and what in event["args"]:
            total[event["args"]["request"]] += event["args"][what]
    return total


@pytest.mark.asyncio
async def test_a_rows_tokens_are_what_its_request_got(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.001, max_num_batched_tokens=16) as rig:
        recorder = record(rig)
        rig.submit_all()
        await rig.all_ended()
        steps, timeline = rig.service.stats().step, recorder.timeline(perf_counter())
    events = read(to_json(timeline))
    rows = [e for e in events if e["ph"] == "X" and "request" in e["args"]]
    got = {f"test/{i}": len(rig.sink.tokens[str(i)]) for i in range(len(PROMPTS))}
    assert sums(rows, "sampled") == got
    assert sums(rows, "tokens") == {f"test/{i}": len(p) + got[f"test/{i}"] - 1 for i, p in enumerate(PROMPTS)}
    prefills = [e["args"]["tokens"] for e in rows if e["name"] == "prefill" and e["args"]["request"] == "test/1"]
    assert sum(prefills) == len(PROMPTS[1]) and len(prefills) >= 3
    flights = track(events, "step in flight")
    assert [e["args"]["step"] for e in flights] == list(range(steps))
    for rank in ("rank 0", "rank 1"):
        parts = Counter(e["name"] for e in track(events, rank))
        assert (parts["forward"], parts["sample"]) == (steps, steps)
        for mine, flight in zip([e for e in track(events, rank) if e["name"] == "forward"], flights, strict=True):
            assert mine["args"]["step"] == flight["args"]["step"] and mine["args"]["tokens"] == flight["args"]["tokens"]
            assert mine["dur"] >= 1000 and mine["ts"] + mine["dur"] <= flight["ts"] + flight["dur"], "within the wait"
    assert Counter(e["name"] for e in track(events, "scheduler")) == dict.fromkeys(
        ("plan", "send", "apply", "deliver"), steps
    )
    ends = Counter(e["name"] for e in events if e["ph"] == "i")
    assert ends == {"length": len(PROMPTS)}


@pytest.mark.asyncio
async def test_losses_preemptions_and_what_is_thrown_away_are_seen(tmp_path: Path) -> None:
    """Blocks for fewer than run, a rank that is killed, and an abort with a step in flight."""
    async with faulty(tmp_path, pace=0.002, num_blocks=9, block_size=8, reserve_output="none") as rig:
        recorder = record(rig)
        for i in range(3):
            rig.submit(str(i), [i + 1] * 9, params(i, 30))
        await rig.sink.begun("0", 3)
        os.kill(rig.service.engine_pids[1], signal.SIGKILL)
        rig.submit("gone", [7] * 3, params(9, 40))
        await rig.sink.begun("gone", 1)
        rig.service.abort(Abort("gone"), rig.sink)
        await rig.sink.ended("0", "1", "2")
        preemptions, timeline = rig.service.stats().preemptions, recorder.timeline(perf_counter())
    events = read(to_json(timeline))
    marks = Counter(e["name"] for e in events if e["ph"] == "i")
    assert preemptions > 0 and marks["preempted"] == preemptions
    assert marks["engine group lost"] == 1 and 1 <= marks["lost"] <= 3 and marks["abort"] == 1 and marks["length"] == 3
    rows = [e for e in events if e["ph"] == "X" and "request" in e["args"]]
    assert sums(rows, "sampled") == {f"test/{name}": len(tokens) for name, tokens in rig.sink.tokens.items()}
    assert all(e["args"]["request"] == "test/gone" for e in rows if e["name"] == "discarded")


@pytest.mark.asyncio
async def test_the_command_records_a_server(tmp_path: Path) -> None:
    """In the middle of requests: what began before and ends after is there, too."""
    os.chmod(tmp_path, 0o700)
    endpoint, file = f"ipc://{tmp_path}/s.ipc", tmp_path / "trace.json"
    async with faulty(tmp_path, pace=0.05) as rig:
        server = ClientServer(rig.service, endpoint)
        rig.submit("long", [1, 2, 3], SamplingParams(seed=1, max_tokens=500))
        await rig.sink.begun("long", 2)
        command = [sys.executable, "-m", "treadle", "trace", "--seconds", "0.5", "--endpoint", endpoint]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, "-o", str(file), stdout=pipe)
        said, _ = await process.communicate()
        assert (process.returncode, said.decode()) == (0, f"wrote {file}; open it at https://ui.perfetto.dev\n")
        assert rig.service.observers.recorder is None, "it costs nothing any more"
        async with Client(endpoint) as client:
            with pytest.raises(InvalidRequest, match="above 0"):
                await client.trace(-1.0)
            first = asyncio.create_task(client.trace(60.0))
            while rig.service.observers.recorder is None:
                await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await client.trace(1.0)
            first.cancel()
        server.close()
    events = read(file.read_bytes())
    rows = [e for e in events if e["ph"] == "X" and "request" in e["args"]]
    assert {(e["name"], e["args"]["request"]) for e in rows} == {("decode", "test/long")}
    assert len(rows) == len(track(events, "step in flight")) > 2


@pytest.mark.asyncio
async def test_over_tcp_nobody_looks_at_others(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys")
    async with faulty(tmp_path, tensor_parallel_size=1) as rig:
        with socket.create_server(("127.0.0.1", 0)) as free:
            endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        server = ClientServer(rig.service, endpoint, read_keys(tmp_path / "keys"))
        async with Client(endpoint, server_key=keys.public) as client:
            with pytest.raises(InvalidRequest, match="on the server's own machine"):
                await client.trace(0.1)
            assert rig.service.observers.recorder is None
        server.close()
    with pytest.raises(ServiceClosed):
        await rig.service.record(1.0)


@pytest.mark.asyncio
async def test_a_recording_is_bounded_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MOST_ENTRIES", 20)
    async with faulty(tmp_path, tensor_parallel_size=1) as rig:
        recorder = record(rig)
        rig.submit_all()
        await rig.all_ended()
        timeline: Timeline = recorder.timeline(perf_counter())
        assert rig.service.stats().step > len(timeline.steps)
    assert timeline.full and sum(len(step.uses) // 4 for step in timeline.steps) <= 20
    assert any(event["name"] == "full" for event in read(to_json(timeline)))
