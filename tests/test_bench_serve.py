"""`treadle bench serve`: what it measures is known by construction in virtual time, and checked against real servers.

In virtual time a fake endpoint answers after exact times, so latencies are sums that can be done in the head.
"""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from aiohttp import web

from treadle import Client
from treadle.bench.drive import Driver, Record
from treadle.bench.openai_target import OpenAITarget
from treadle.bench.plan import Ask, Plan, Rate, drawn, generator, random_lengths, token_plan, word_plan
from treadle.bench.report import Goals, build_report, table
from treadle.bench.target import Refused, Told, Usage
from treadle.cli import main
from treadle.errors import ConfigError, ServerLost
from treadle.scheduler.simulation.workload import make_workload
from treadle.transport.messages import Stats

from .servekit import Server, serving

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing is ready, time goes on to what comes next, at once."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return self.now


class _Selector(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._virtual = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self._virtual.now += timeout
        return super().select(0)


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


@dataclass
class Slow:
    """Serves one request at a time: `first` seconds to the first token, `each` for every other one."""

    first: float
    each: float
    fails: dict[int, str] = field(default_factory=dict)
    asked: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def ask(self, ask: Ask, told: Told) -> Usage:
        number, self.asked = self.asked, self.asked + 1
        if number in self.fails:
            raise Refused(self.fails[number], "as told")
        async with self.lock:
            await asyncio.sleep(self.first)
            told(1)
            for _ in range(ask.output - 1):
                await asyncio.sleep(self.each)
                told(1)
        return Usage(len(ask.prompt), ask.output)


def every(seconds: float, count: int, output: int = 3, timed: bool = True) -> Plan:
    return Plan([Ask(i * seconds, [7, 8], output) for i in range(count)], timed)


def measured(target: Slow, plan: Plan, most: int = 0, patience: float = 1e6) -> list[Record]:
    async def run() -> list[Record]:
        return await Driver(target, asyncio.get_running_loop().time, most, patience).run(plan)

    return virtually(run())


def test_latency_begins_when_a_request_is_due() -> None:
    """One is served in 3 s and one is due every second: each waits 2 s longer than the one before, and that counts."""
    records = measured(Slow(first=1.0, each=1.0), every(1.0, 4))
    assert [r.ttft for r in records] == pytest.approx([1, 3, 5, 7])
    assert [r.end_to_end for r in records] == pytest.approx([3, 5, 7, 9])
    assert [r.tpot for r in records] == pytest.approx([1.0] * 4)
    assert [r.gaps for r in records] == [pytest.approx([1, 1])] * 4
    report = build_report(records, Goals.of([]))
    assert report["duration"] == pytest.approx(12) and report["output_throughput"] == pytest.approx(1)
    assert (report["median_ttft_ms"], report["max_ttft_ms"]) == (pytest.approx(4000), pytest.approx(7000))
    assert report["max_late_ms"] == 0 and report["max_concurrent_requests"] == 3
    assert report["mean_concurrent_requests"] == pytest.approx((3 + 5 + 7 + 9) / 12)


def test_what_waits_for_a_slot_of_ours_counts_too() -> None:
    """No coordinated omission: the same endpoint looks the same however few requests are let through at once."""
    free = build_report(measured(Slow(1.0, 1.0), every(1.0, 4)), Goals.of([]))
    held = build_report(measured(Slow(1.0, 1.0), every(1.0, 4), most=1), Goals.of([]))
    names = [f"{kind}_{name}_ms" for kind in ("mean", "p90", "max") for name in ("ttft", "e2el", "tpot", "itl")]
    assert [held[name] for name in names] == pytest.approx([free[name] for name in names])
    assert held["max_late_ms"] == pytest.approx(6000), "sent at 9 s, due at 3 s"
    assert held["max_concurrent_requests"] == 1


def test_where_nothing_is_due_latency_begins_at_sending() -> None:
    records = measured(Slow(1.0, 1.0), every(0.0, 4, timed=False), most=1)
    assert [r.ttft for r in records] == pytest.approx([1] * 4) and [r.due for r in records] == [0, 3, 6, 9]
    together = measured(Slow(1.0, 1.0), every(0.0, 3, timed=False))
    assert [r.ttft for r in together] == pytest.approx([1, 4, 7]), "all at once: the queue is the endpoint's"


def test_goodput_and_failures() -> None:
    slow = Slow(1.0, 0.5, fails={1: "HTTP 429", 3: "HTTP 429", 4: "Incomplete"})
    plan = Plan([*every(10.0, 5).asks, Ask(50.0, [1], 1), Ask(60.0, [1], 9), Ask(61.0, [1], 3)], timed=True)
    report = build_report(measured(slow, plan), Goals.of(["ttft:2000", "e2el:2500"]))
    assert report["errors"] == {"HTTP 429": 2, "Incomplete": 1} and report["completed"] == 5
    assert report["error_examples"]["HTTP 429"] == "as told"
    assert report["good_requests"] == 3, "nine tokens take 5 s, and who is behind them has the first after 5 s"
    assert report["request_goodput"] == pytest.approx(3 / report["duration"])
    assert report["max_tpot_ms"] == pytest.approx(500), "an answer of one token has none"
    shown = table(report)
    assert "2 × HTTP 429: as told" in shown and "5 of 8 succeeded" in shown and "within ttft 2000 ms" in shown
    nothing = build_report(measured(Slow(1, 1, fails={0: "X"}), every(1.0, 1)), Goals.of(["tpot:1"]))
    assert nothing["completed"] == 0 and nothing["mean_ttft_ms"] is None and "–" in table(nothing)


def test_nobody_waits_longer_than_was_said() -> None:
    records = measured(Slow(1.0, 1.0), every(0.0, 3), patience=4.0)
    assert [r.error for r in records] == ["", "Timeout", "Timeout"]
    assert [r.ended for r in records] == pytest.approx([3, 4, 4])
    own = Plan([Ask(0.0, [1], 3), Ask(0.0, [1], 3, timeout=1.5)], timed=True)
    assert [r.error for r in measured(Slow(1.0, 1.0), own)] == ["", "Timeout"]


@pytest.mark.parametrize("words", [["ttft"], ["ttft:x"], ["ttft:-1"], ["itl:5"], ["tpot:nan"]])
def test_goals_that_mean_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="ttft, tpot, e2el"):
        Goals.of(words)


# ── what is asked ──


def test_arrivals_are_of_the_rate_and_as_bursty_as_was_said() -> None:
    for burstiness in (0.25, 1.0, 16.0):
        gaps = np.diff(Rate(per_second=20, burstiness=burstiness).arrivals(40_000, generator(3)), prepend=0)
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert not Rate(per_second=inf).arrivals(5, generator(0)).any()


def test_lengths_come_once_before_any_comes_twice() -> None:
    lengths = [(i, 2 * i) for i in range(1, 8)]
    work = drawn(lengths, 17, Rate(), generator(1))
    pairs = list(zip(work.inputs.tolist(), work.outputs.tolist(), strict=True))
    assert sorted(pairs[:7]) == sorted(pairs[7:14]) == lengths and len(set(pairs[14:])) == 3
    spread = random_lengths(500, 100, 10, 0.5, generator(2))
    assert {50, 150} <= {i for i, _ in spread} <= {*range(50, 151)} and {o for _, o in spread} == {*range(5, 16)}
    assert random_lengths(3, 5, 6, 0.0, generator(2)) == [(5, 6)] * 3


def test_prompts_have_their_lengths_share_their_prefixes_and_repeat() -> None:
    work = make_workload([0, 1, 2], [10, 12, 9], [1, 1, 1], prefix=[0, 0, -1], prefix_tokens=[6, 6, 0])
    for make in (lambda seed: token_plan(work, True, 50, seed), lambda seed: word_plan(work, True, seed)):
        a, b, c = (_parts(ask) for ask in make(1).asks)
        assert [len(a), len(b), len(c)] == [10, 12, 9]
        assert a[:6] == b[:6] and a[6:] != b[6:10] and a[:6] != c[:6]
        assert make(1) == make(1) and make(1) != make(2)
    tokens = [token for ask in token_plan(work, True, 50, 1).asks for token in ask.prompt]
    assert all(isinstance(token, int) and 3 <= token < 50 for token in tokens)


def _parts(ask: Ask) -> list[Any]:
    return ask.prompt.split() if isinstance(ask.prompt, str) else list(ask.prompt)


# ── an endpoint that misbehaves ──


async def _answers(request: web.Request) -> web.StreamResponse:
    """As the prompt says."""
    kind = (await request.json())["prompt"]
    if kind == "busy":
        return web.json_response({"error": {"message": "later"}}, status=429)
    answer = web.StreamResponse()
    await answer.prepare(request)
    good = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'
    for part in {
        "good": [good[:30], good[30:] + good + b": a comment\n\n", b'data: {"choices": [{"text": "", "finish_reason": '
                 b'"length"}]}\r\n\r\ndata: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}}\n\n',
                 b"data: [DONE]\n\n"],
        "error": [good, b'data: {"error": {"message": "it died"}}\n\n'],
        "short": [good],
        "garbage": [good, b"data: {]\n\n"],
        "cut": [good],
    }[kind]:  # fmt: skip
        await answer.write(part)
    if kind == "cut" and request.transport is not None:
        request.transport.abort()
    return answer


@pytest.mark.asyncio
async def test_every_way_to_fail_has_a_name() -> None:
    app = web.Application()
    app.router.add_post("/v1/completions", _answers)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = site.name if runner.addresses[0][1] == 0 else f"http://127.0.0.1:{runner.addresses[0][1]}"
    expected = {
        "good": "",
        "busy": "HTTP 429",
        "error": "StreamError",
        "short": "Incomplete",
        "garbage": "BadEvent",
        "cut": "ClientPayloadError",
    }
    try:
        async with OpenAITarget(url, model="m") as target:
            driver = Driver(target, asyncio.get_running_loop().time)
            records = await driver.run(Plan([Ask(0.0, kind, 2) for kind in expected], timed=True))
            assert {r.ask.prompt: r.error for r in records} == expected
            assert records[0].usage == Usage(4, 2) and len(records[0].pieces) == 3
        with pytest.raises(ServerLost, match="give --model"):
            await OpenAITarget(url).__aenter__()
    finally:
        await runner.cleanup()
    async with OpenAITarget(url, model="m") as target:
        [record] = await Driver(target, asyncio.get_running_loop().time).run(Plan([Ask(0.0, "good", 2)], timed=True))
        assert record.error == "ClientConnectorError"


# ── real servers, the command as it is typed ──


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--http", "127.0.0.1:0", "--model-name", "tiny", "--dtype", "float32", "--max-num-seqs", "8")
    with serving(tmp_path_factory.mktemp("server"), tiny, *options, "--debug") as started:
        yield started


def stats_of(server: Server) -> Stats:
    async def look() -> Stats:
        async with Client(server.endpoint) as client:
            return await client.stats()

    return asyncio.run(look())


@pytest.mark.parametrize("way", ["--endpoint", "--base-url"])
def test_the_figures_are_those_of_the_server(
    server: Server, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = tmp_path / "lengths.jsonl"
    lengths.write_text("[20, 6]\n[7, 12]\n[40, 3]\n")
    out, picture = tmp_path / "out.json", tmp_path / "out.svg"
    where = server.endpoint if way == "--endpoint" else server.url
    before = stats_of(server)
    command = ["bench", "serve", way, where, "--dataset", str(lengths), "--num-prompts", "12", "--vocab-size", "256"]
    command += ["--request-rate", "200", "--goodput", "ttft:600000", "--json", str(out), "--plot", str(picture)]
    assert main([*command, "--warmup", "0"]) == 0
    after = stats_of(server)
    found = json.loads(out.read_bytes())
    assert found["completed"] == found["good_requests"] == after.finished - before.finished == 12
    assert found["total_output_tokens"] == after.generated_tokens - before.generated_tokens == 4 * (6 + 12 + 3)
    assert found["total_input_tokens"] == after.prompt_tokens - before.prompt_tokens == 4 * (20 + 7 + 40)
    assert found["errors"] == {} and found["seed"] == 0
    each = found["each"]
    assert all(
        d <= s <= f <= e for d, s, f, e in zip(each["due"], each["sent"], each["first"], each["last"], strict=True)
    )
    assert "12 of 12 succeeded" in capsys.readouterr().out and b"<svg" in picture.read_bytes()


def test_traces_chats_and_prompts(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, prompts = tmp_path / "trace.jsonl", tmp_path / "prompts.jsonl"
    shared = {"prefix": "a", "prefix_tokens": 64, "tenant": "ann", "priority": 1}
    lines = [{"arrival": 0.01 * i, "input": 80, "output": 4, **shared} for i in range(4)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    prompts.write_text('{"prompt": "Hello", "output_tokens": 3}\n{"prompt": "World"}\n')
    before = stats_of(server)
    ours, theirs = ["bench", "serve", "--endpoint", server.endpoint], ["bench", "serve", "--base-url", server.url]
    assert main([*ours, "--trace", str(trace), "--max-concurrency", "1", "--warmup", "0"]) == 0
    middle = stats_of(server)
    assert middle.generated_tokens - before.generated_tokens == 16
    assert middle.cached_prompt_tokens - before.cached_prompt_tokens >= 3 * 48, "what they share was found"
    assert main([*theirs, "--prompts", str(prompts), "--num-prompts", "3", "--output-len", "5", "--warmup", "0"]) == 0
    assert stats_of(server).generated_tokens - middle.generated_tokens == 3 + 5 + 3
    assert main([*theirs, "--chat", "--num-prompts", "2", "--input-len", "5", "--output-len", "4"]) == 0
    assert capsys.readouterr().out.count("succeeded") == 3


def test_exit_codes_and_what_is_refused(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve = ["bench", "serve"]
    long = ["--base-url", server.url, "--input-len", "5000", "--num-prompts", "2", "--vocab-size", "200"]
    assert main([*serve, *long, "--warmup", "0"]) == 1, "all failed"
    assert "2 × HTTP 400" in capsys.readouterr().out
    assert main([*serve, *long]) == 2 and "the first request failed" in capsys.readouterr().err
    assert main([*serve, "--base-url", "http://127.0.0.1:9"]) == 2
    lengths = tmp_path / "lengths"
    lengths.write_text("[1]\n")
    for wrong, said in (
        ([], "--base-url, --endpoint"),
        (["--base-url", "ftp://x"], "http://"),
        (["--endpoint", "default", "--chat"], "--chat: with --base-url"),
        (["--base-url", server.url, "--request-rate", "0"], "above 0, or inf"),
        (["--base-url", server.url, "--burstiness", "-1"], "burstiness"),
        (["--base-url", server.url, "--num-prompts", "0"], "from 1"),
        (["--base-url", server.url, "--dataset", str(lengths)], "line 1"),
        (["--base-url", server.url, "--trace", "a", "--dataset", "b"], "give one of them"),
        (["--base-url", server.url, "--extra-body", "[]"], "--extra-body"),
        (["--base-url", server.url, "--plot", "x.gif"], ".svg"),
        (["--base-url", server.url, "--range-ratio", "1"], "spread"),
    ):
        assert main([*serve, *wrong]) == 2, wrong
        assert said in capsys.readouterr().err, wrong
