"""Spans of requests, as a collector gets them, held against what happened to the requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from treadle import LLM, Client, SamplingParams
from treadle.errors import ConfigError, InvalidParameter, InvalidRequest
from treadle.http import HttpServer
from treadle.scheduler.client_server import ClientServer
from treadle.scheduler.options import service_options
from treadle.scheduler.request_trace import MOST_SPANS, Part, begin_trace
from treadle.scheduler.tracing.exporter import MOST_WAITING, TraceExporter
from treadle.scheduler.tracing.start import start_tracing
from treadle.transport.codec import pack
from treadle.transport.messages import Abort, Submit

from .conftest import eventually
from .faultkit import PROMPTS, faulty, params
from .otelkit import Collector, Span, collecting

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CALLER}-01"
CLOCK = 2e-3  # two clocks are read one after the other, on a machine that does other things too


def check_tree(collector: Collector, root: Span, prompt: int, output: int) -> list[Span]:
    """What is true of every request that ran: its parts follow each other and lie within it."""
    parts = collector.parts(root)
    assert parts[0].name == "queue" and parts[0].began == pytest.approx(root.began, abs=CLOCK)
    assert parts[-1].ended == pytest.approx(root.ended, abs=CLOCK)
    assert all(root.began - CLOCK <= part.began <= part.ended <= root.ended + CLOCK for part in parts)
    assert all(before.ended <= after.began + CLOCK for before, after in pairwise(parts)), "one thing at a time"
    decodes = [part for part in parts if part.name == "decode"]
    assert sum(part.about["treadle.tokens"] for part in decodes) == output - len(decodes), "a prefill brings one, too"
    about = root.about
    assert (about["gen_ai.usage.prompt_tokens"], about["gen_ai.usage.completion_tokens"]) == (prompt, output)
    assert about["gen_ai.latency.e2e"] == pytest.approx(root.ended - root.began, abs=CLOCK)
    queue = parts[0].ended - parts[0].began
    assert about["gen_ai.latency.time_in_queue"] == pytest.approx(queue, abs=CLOCK)
    first = next(part.began for part in parts if part.name == "decode")
    assert about["gen_ai.latency.time_to_first_token"] == pytest.approx(first - root.began, abs=CLOCK)
    return parts


@pytest.mark.asyncio
async def test_a_killed_rank_is_a_recovery_in_every_trace(tmp_path: Path) -> None:
    with collecting() as collector:
        options = {"otlp_traces_endpoint": collector.url, "max_num_batched_tokens": 16, "pipeline_depth": 1}
        async with faulty(tmp_path, pace=0.002, **options) as rig:
            began = time.time()
            for i, prompt in enumerate(PROMPTS):
                rig.submit(str(i), prompt, params(i), tenant=f"t{i}", traceparent=PARENT if i == 1 else "")
            for i in range(len(PROMPTS)):
                await rig.sink.begun(str(i), 5)
            os.kill(rig.service.engine_pids[0], signal.SIGKILL)
            await rig.all_ended()
            took = time.time() - began
            seconds = rig.events[1].seconds  # type: ignore[union-attr]
            roots = collector.requests(len(PROMPTS))
            assert rig.exact()
            eventually(lambda: rig.service.metrics().traces == {"exported": 4, "dropped": 0}, "all are counted")
    for i, root in enumerate(roots):
        parts = check_tree(collector, root, len(PROMPTS[i]), 40)
        names = [part.name for part in parts]
        chunks = [part.about["treadle.tokens"] for part in parts if part.name == "prefill"]
        again = names.index("recovery") + 1
        assert names.count("recovery") == 1 and names[again - 1 : again + 1] == ["recovery", "prefill"]
        before = sum(name == "prefill" for name in names[:again])
        assert sum(chunks[:before]) == len(PROMPTS[i]), "its chunks are its prompt"
        decoded = next(part for part in parts if part.name == "decode").about["treadle.tokens"]
        assert sum(chunks[before:]) == len(PROMPTS[i]) + 1 + decoded, "all that was committed is computed again"
        assert before >= (3 if i == 1 else 1) and max(chunks) <= 16
        lost = parts[again - 1]
        assert seconds - 0.5 <= lost.ended - lost.began <= took
        assert root.about["treadle.tenant"] == f"t{i}" and root.about["treadle.recoveries"] == 1
        assert root.about["gen_ai.response.finish_reasons"] == ["length"] and not root.failed
        assert (root.trace, root.parent) == (TRACE, CALLER) if i == 1 else root.parent == ""
    assert len({root.trace for root in roots}) == len(roots)
    assert collector.resource["service.name"] == "treadle"


@pytest.mark.asyncio
async def test_waiting_leaving_and_failing_are_seen(tmp_path: Path) -> None:
    """One is aborted while it waits, one of two continuations while it runs, and one at fault ends with an error."""
    with collecting() as collector:
        options = {"otlp_traces_endpoint": collector.url, "max_num_seqs": 2, "pipeline_depth": 1}
        async with faulty(tmp_path, "0 4 row", pace=0.002, tensor_parallel_size=1, **options) as rig:
            rig.submit("pair", [1, 2, 3], SamplingParams(seed=1, n=2, max_tokens=30))
            rig.submit("waits", [4], params(2))
            rig.service.abort(Abort("waits"), rig.sink)  # at once: later the row at fault may be its own
            assert await rig.service.drain(30.0)
            pair, waits = collector.requests(2)
    queue, *_ = collector.parts(waits)
    assert [part.name for part in collector.parts(waits)] == ["queue"]
    assert waits.about["gen_ai.response.finish_reasons"] == ["abort"]
    assert waits.about["gen_ai.usage.completion_tokens"] == 0
    assert "gen_ai.latency.time_to_first_token" not in waits.about
    assert queue.ended == pytest.approx(waits.ended, abs=CLOCK)
    assert pair.failed and sorted(pair.about["gen_ai.response.finish_reasons"]) == ["error", "length"]
    assert pair.about["gen_ai.usage.completion_tokens"] == 30 + 3
    by_index = [[p.name for p in collector.parts(pair) if p.about["treadle.continuation"] == i] for i in (0, 1)]
    assert by_index == [["queue", "prefill", "decode"]] * 2


@pytest.mark.asyncio
async def test_an_unreachable_collector_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.2")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and nobody listens
        endpoint = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/traces"
        async with faulty(tmp_path, otlp_traces_endpoint=endpoint) as rig:
            rig.submit_all()
            await rig.all_ended()
            assert rig.exact()
            eventually(lambda: rig.service.metrics().traces == {"exported": 0, "dropped": 4}, "they are given up")


def test_a_collector_that_hangs_fills_no_memory() -> None:
    """The queue is bounded, what does not fit is counted, and closing does not wait for it."""

    class Hangs:
        def __init__(self) -> None:
            self.event = threading.Event()

        def send(self, traces: object) -> bool:
            self.event.wait(60)
            return False

        def shutdown(self) -> None:
            self.event.set()

    exporter = TraceExporter(Hangs())
    trace = begin_trace(Submit(id="a", tokens=b"", params=SamplingParams()), 0.0, 1)
    for _ in range(MOST_WAITING + 200):
        exporter.put(trace)
    assert 0 < exporter.dropped <= 200
    exporter.close()
    assert (exporter.exported, exporter.dropped) == (0, MOST_WAITING + 200)


def test_a_request_keeps_so_many_parts() -> None:
    trace = begin_trace(Submit(id="a", tokens=pack([1] * 7), params=SamplingParams()), 0.0, 1)
    for _ in range(MOST_SPANS + 5):
        trace.add(Part(0, "prefill", 0.0, 1.0))
    assert (len(trace.parts), trace.left_out, trace.prompt_tokens, trace.submit.tokens) == (MOST_SPANS, 5, 7, b"")


@pytest.mark.asyncio
async def test_a_client_and_its_gateway_bring_the_callers_span(tmp_path: Path) -> None:
    """Through ZeroMQ, and through HTTP in front of it."""
    with collecting() as collector:
        async with faulty(tmp_path, otlp_traces_endpoint=collector.url) as rig:
            os.chmod(tmp_path, 0o700)
            endpoint = f"ipc://{tmp_path}/s.ipc"
            server = ClientServer(rig.service, endpoint)
            async with Client(endpoint) as client, HttpServer(client, "127.0.0.1:0") as http:
                headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
                await client.generate([1, 2], params(1, 3), trace_headers=headers).final()
                async with httpx.AsyncClient(base_url=http.url) as web:
                    body = {"model": "none", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
                    for sent in (headers, {"traceparent": "00-what"}, {"traceparent": "x" * 9000}):
                        (await web.post("/v1/completions", json=body, headers=sent)).raise_for_status()
                for wrong, kind in (("00", InvalidRequest), ({"traceparent": 7}, InvalidParameter)):
                    with pytest.raises(kind):
                        client.generate([1], trace_headers=wrong)  # type: ignore[arg-type]
                roots = collector.requests(4)
            server.close()
    assert [(root.trace, root.parent, root.state) for root in roots[:2]] == [(TRACE, CALLER, "vendor=1")] * 2
    assert [root.parent for root in roots[2:]] == ["", ""], "what is no traceparent begins a trace of its own"
    check_tree(collector, roots[0], 2, 3)
    check_tree(collector, roots[1], 3, 4)


@pytest.mark.asyncio
async def test_an_embedded_engine_traces_too(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by the environment alone, whose other variables count as well."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-who=me")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        async with LLM(str(tiny), dtype="float32", num_blocks=40) as llm:
            output = await llm.generate([5] * 9, params(3, 6), trace_headers={"Traceparent": PARENT}).final()
            [root] = collector.requests(1)
            assert json.loads(await llm.trace(0.01))["traceEvents"]
    assert (root.trace, root.parent) == (TRACE, CALLER)
    check_tree(collector, root, 9, len(output.outputs[0].token_ids))
    assert collector.resource["service.name"] == "mine" and collector.headers["x-who"] == "me"


def test_what_cannot_be_traced_to_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("collector:4318", "grpc://collector", "http://"):
        with pytest.raises(ConfigError, match="a URL is allowed"):
            service_options(otlp_traces_endpoint=wrong)
    assert start_tracing("", "m") is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317")
    for name, value in (
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert start_tracing("", "m") is None, f"{name}={value} is heard"
