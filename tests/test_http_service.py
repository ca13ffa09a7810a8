"""The gateway as a process: beside a server, in front of one that comes and goes, and what it tells Prometheus."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from treadle import LLM, SamplingParams
from treadle.errors import ConfigError, EndpointInUse, EngineFailed
from treadle.http import GatewaySettings, HttpServer
from treadle.http.child import GatewayChild, reachable
from treadle.http.settings import listen, read_key_file
from treadle.transport.endpoints import write_keys
from treadle.transport.messages import ServiceMetrics, Stats

from .clikit import ended
from .conftest import alive, eventually
from .httpkit import Scripted, async_client, client, metrics
from .servekit import serving

FIXED: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@contextmanager
def gateway(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A `treadle gateway`, and its address; it may not have reached its service yet."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "treadle", "gateway", *arguments, "--http", address]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        yield process, f"http://{address}"
    finally:
        process.kill()
        process.wait()


class Broken(GatewayChild):
    """Ends at once, every time."""

    spawned = 0

    def _spawn(self, lifeline: int, reporting: int) -> subprocess.Popen[bytes]:
        self.spawned += 1
        if self.spawned == 3:
            raise OSError("no process is to be had at the moment")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])


@pytest.mark.asyncio
async def test_a_gateway_that_never_comes_up_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treadle.http.child._AGAIN_SECONDS", 0.0)
    child = Broken("127.0.0.1:0", "ipc:///nobody", None, GatewaySettings())
    with pytest.raises(ConfigError, match="code 7, 3 times in a row"):
        await child.run()
    assert child.spawned == 4, "one that was not started is not counted"


def status(url: str) -> int:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.asyncio
async def test_health_is_progress_and_a_lost_engine_costs_no_token(tiny: Path, tmp_path: Path) -> None:
    with serving(
        tmp_path / "server", tiny, "--http", "127.0.0.1:0", "--model-name", "m", "--dtype", "float32"
    ) as server:
        async with async_client(server.url) as api:
            ask: dict[str, Any] = {"model": "m", "prompt": "Hello", "max_tokens": 200, **FIXED}
            expected = (await api.completions.create(**ask)).choices[0].text
            stream = await api.completions.create(stream=True, **ask)
            text, states, killed = "", set(), False
            async for chunk in stream:
                text += chunk.choices[0].text
                if not killed:
                    killed = True
                    os.kill(server.ranks[0], signal.SIGKILL)
                    while (state := (await asyncio.to_thread(httpx.get, f"{server.url}/health"))).status_code != 503:
                        pass
                    states.add(state.json()["status"])
            assert text == expected and states == {"degraded"}
        eventually(lambda: status(server.url) == 200, "healthy again")
        assert metrics(server.url)['treadle:recoveries_total{model_name="m"}'] == 1
        # The gateway's process is not the service's: it is replaced alone, at the same address.
        children = psutil.Process(server.process.pid).children()
        [process] = [child for child in children if "gateway" in child.cmdline()]
        process.kill()
        eventually(lambda: not alive([process.pid]), "it is gone")
        eventually(lambda: status(server.url) == 200, "another gateway")
        with client(server.url) as plain:
            assert plain.completions.create(**ask).choices[0].text == expected
        assert server.end() == 0
        assert status(server.url) == 0


def test_a_gateway_outlives_its_service(tiny: Path, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path / 's' / 'service.ipc'}"
    with gateway(endpoint, "--model-name", "m") as (process, url), client(url) as api:
        eventually(lambda: status(url) == 503, "it answers, and says that nothing is there")
        with pytest.raises(openai.InternalServerError) as nobody:
            api.completions.create(model="m", prompt="a")
        assert nobody.value.status_code == 503 and nobody.value.response.headers["retry-after"]
        with serving(tmp_path / "s", tiny, "--dtype", "float32", endpoint=endpoint) as server:
            assert process.stdout is not None
            assert process.stdout.readline().decode() == f"treadle: ready on {url}\n"
            assert status(url) == 200
            stream = api.completions.create(model="m", prompt="a", max_tokens=500, stream=True, **FIXED)
            next(stream)
            server.process.kill()
            with pytest.raises(openai.APIError):
                for _ in stream:
                    pass
            eventually(lambda: status(url) == 503, "it says that the service is lost")
            os.kill(process.pid, 0)
        with serving(tmp_path / "s", tiny, "--dtype", "float32", endpoint=endpoint):
            eventually(lambda: status(url) == 200, "it found the new one")
            assert api.completions.create(model="m", prompt="a", max_tokens=3).choices[0].text is not None
            process.terminate()
            assert process.wait(20) == 0


def test_gateways_over_tcp_and_a_killed_server_takes_its_own_with_it(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys")
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    options = ("--keys", str(tmp_path / "keys"), "--dtype", "float32", "--http", "127.0.0.1:0")
    with (
        serving(tmp_path / "s", tiny, *options, endpoint=endpoint) as server,
        gateway(endpoint, "--server-key", keys.public) as (process, url),
    ):
        assert process.stdout is not None
        process.stdout.readline()
        assert status(url) == status(server.url) == 200
        pids = [child.pid for child in psutil.Process(server.process.pid).children()]
        assert len(pids) == 2
        server.process.kill()
        server.process.wait()
        eventually(lambda: not alive(pids), "rank and gateway are gone")
        assert alive([process.pid])


@pytest.mark.asyncio
async def test_every_metric_is_what_happened(tiny: Path) -> None:
    """Known requests through a gateway over an embedded engine; then every sample is accounted for."""
    async with (
        LLM(str(tiny), dtype="float32", num_blocks=40, block_size=16, max_num_seqs=2) as llm,
        HttpServer(llm, "127.0.0.1:0", GatewaySettings(model_names=["m"])) as server,
        async_client(server.url) as api,
    ):
        ask: dict[str, Any] = {"model": "m", **FIXED}
        for _ in range(3):
            await api.completions.create(prompt=[1] * 33, max_tokens=5, **ask)
        async for _ in await api.completions.create(prompt=[2] * 10, max_tokens=9, n=2, stream=True, **ask):
            pass
        ended = {"temperature": 0, "extra_body": {"logit_bias": {"257": 100}}}
        await api.completions.create(model="m", prompt=[3] * 8, **ended)
        with pytest.raises(openai.BadRequestError):
            await api.completions.create(prompt=[1] * 600, **ask)
        with pytest.raises(openai.BadRequestError):  # by the client's side of the gateway: nobody has left
            await api.completions.create(model="m", prompt=[1], extra_body={"structured_outputs": {}})
        with pytest.raises(openai.NotFoundError):
            await api.completions.create(model="x", prompt="a")
        await api.models.list()
        seen = await asyncio.to_thread(metrics, server.url)
        stats, figures = await llm.stats(), await llm.metrics()
    assert_gateway(seen)
    model = '{model_name="m"}'
    assert stats.prompt_tokens == 3 * 33 + 2 * 10 + 8
    service = {
        "treadle:healthy": 1,
        "treadle:step_age_seconds": 0,
        "treadle:num_requests_running": 0,
        "treadle:num_requests_waiting": 0,
        "treadle:kv_cache_usage_perc": 0,
        "treadle:prefix_cache_hit_rate": stats.hit_rate,
        "treadle:prefix_cache_queries_total": stats.prompt_tokens,
        "treadle:prefix_cache_hits_total": stats.cached_prompt_tokens,
        "treadle:kv_cache_evictions_total": stats.evictions,
        "treadle:prompt_tokens_total": stats.prompt_tokens,
        "treadle:generation_tokens_total": 3 * 5 + 2 * 9 + 1,
        "treadle:num_preemptions_total": stats.preemptions,
        "treadle:recoveries_total": 0,
        "treadle:requests_finished_total": stats.finished,
        "treadle:bad_frames_total": 0,
        "treadle:steps_total": stats.step,
    }
    for name, value in service.items():
        assert seen[name + model] == value, name
    assert stats.cached_prompt_tokens >= 2 * 32, "the same prompt three times"
    for state, blocks in (("total", stats.blocks_total), ("used", 0), ("cached", stats.blocks_cached)):
        assert seen[f'treadle:kv_cache_blocks{{model_name="m",state="{state}"}}'] == blocks
    told = {f"{name}{model}" for name in service} | {
        name for name in seen if name.startswith("treadle:kv_cache_blocks")
    }
    told |= assert_figures(seen, figures, stats)
    unknown = {name for name in seen if name not in told and "_created" not in name and "_bucket" not in name}
    assert unknown == set(gateway_values()), "a metric that no test looks at"


def assert_figures(seen: dict[str, float], figures: ServiceMetrics, stats: Stats) -> set[str]:
    """The service's histograms, refusals and tenants in that test; returns the names of what was looked at."""
    expected = {'treadle:requests_refused_total{model_name="m",reason="prompt_too_long"}': 1.0}
    for name, value in {
        "requests_running": 0,
        "requests_waiting": 0,
        "prompt_tokens_total": stats.prompt_tokens,
        "cached_prompt_tokens_total": stats.cached_prompt_tokens,
        "generation_tokens_total": 3 * 5 + 2 * 9 + 1,
        "requests_finished_total": 5,
        "requests_refused_total": 1,
    }.items():
        expected[f'treadle:tenant_{name}{{model_name="m",tenant="default"}}'] = value
    counts = dict.fromkeys((f"request_{name}_time_seconds" for name in ("queue", "prefill", "decode", "inference")), 6)
    counts |= dict.fromkeys(("iteration_tokens_total", "iteration_rows", "step_time_seconds"), stats.step)
    counts["recovery_time_seconds"] = 0
    for histogram in figures.histograms:
        labels = '{model_name="m"' + (f',phase="{histogram.phase}"' if histogram.phase else "") + "}"
        expected[f"treadle:{histogram.name}_count{labels}"] = counts[histogram.name]
        expected[f"treadle:{histogram.name}_sum{labels}"] = histogram.total
        found = {
            labelled["le"]: value
            for name, value in seen.items()
            if name.startswith(f"treadle:{histogram.name}_bucket")
            and (labelled := dict(re.findall(r'(\w+)="([^"]*)"', name))).get("phase", "") == histogram.phase
        }
        below = {
            str(bound): sum(histogram.counts[: place + 1]) for place, bound in enumerate((*histogram.bounds, "+Inf"))
        }
        assert found == below, "cumulative, as Prometheus wants them"
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value), name
    computed = stats.prompt_tokens - stats.cached_prompt_tokens + stats.generated_tokens - 6
    assert seen['treadle:iteration_tokens_total_sum{model_name="m"}'] >= computed
    assert figures.losses == figures.traces == {}
    return set(expected)


def gateway_values() -> dict[str, float | None]:
    """What the gateway must have counted in that test; None is a time, which is looked at otherwise."""
    model = '{model_name="m"}'
    ended = {"stop": 1, "length": 5, "abort": 0, "error": 0}
    answers = {
        ("POST", "/v1/completions", "200"): 5,
        ("POST", "/v1/completions", "400"): 2,
        ("POST", "/v1/completions", "404"): 1,
        ("GET", "/v1/models", "200"): 1,
    }
    return {
        "treadle:http_open_requests": 0,
        "treadle:http_disconnects_total": 0,
        **{
            f'treadle:http_requests_total{{method="{method}",path="{path}",status="{code}"}}': count
            for (method, path, code), count in answers.items()
        },
        **{
            f'treadle:request_success_total{{finished_reason="{reason}",model_name="m"}}': count
            for reason, count in ended.items()
        },
        f"treadle:request_prompt_tokens_count{model}": 5,
        f"treadle:request_prompt_tokens_sum{model}": 3 * 33 + 10 + 8,
        f"treadle:request_generation_tokens_count{model}": 5,
        f"treadle:request_generation_tokens_sum{model}": 3 * 5 + 2 * 9 + 1,
        f"treadle:request_params_max_tokens_count{model}": 5,
        f"treadle:request_params_max_tokens_sum{model}": 3 * 5 + 9 + 16,
        f"treadle:request_params_n_count{model}": 5,
        f"treadle:request_params_n_sum{model}": 6,
        f"treadle:time_to_first_token_seconds_count{model}": 5,
        f"treadle:time_per_output_token_seconds_count{model}": 4,  # one answer has a single token
        f"treadle:e2e_request_latency_seconds_count{model}": 5,
        f"treadle:time_to_first_token_seconds_sum{model}": None,
        f"treadle:time_per_output_token_seconds_sum{model}": None,
        f"treadle:e2e_request_latency_seconds_sum{model}": None,
    }


def assert_gateway(seen: dict[str, float]) -> None:
    for name, value in gateway_values().items():
        assert value is None or seen[name] == value, name
    model = '{model_name="m"}'
    ttft, e2e = (seen[f"treadle:{n}_seconds_sum{model}"] for n in ("time_to_first_token", "e2e_request_latency"))
    tpot = seen[f"treadle:time_per_output_token_seconds_sum{model}"]
    assert 0 < ttft < e2e
    # A request lasts from its start to the first token, and then a time per token for each of the others.
    assert 4 * tpot <= e2e - ttft <= 8 * tpot + e2e / 10


@pytest.mark.asyncio
async def test_metrics_of_what_runs_fails_or_is_left(tiny: Path) -> None:
    async with Scripted(tiny) as model, HttpServer(model, "127.0.0.1:0") as server, async_client(server.url) as api:
        model.script, model.error, model.error_after = "0123456789", EngineFailed("it died"), 6
        for stream in (True, False):
            with pytest.raises(openai.APIError):
                answer = await api.completions.create(model="scripted", prompt="a", stream=stream)
                async for _ in answer:  # type: ignore[union-attr]
                    pass
        text = (await httpx.AsyncClient().get(f"{server.url}/metrics")).text
        samples = {
            (s.name, *s.labels.values()): s.value for f in text_string_to_metric_families(text) for s in f.samples
        }
        assert samples[("treadle:request_success_total", "error", "scripted")] == 2
        assert samples[("treadle:time_to_first_token_seconds_count", "scripted")] == 1, "the streamed one had begun"
        assert ("treadle:e2e_request_latency_seconds_count", "scripted") in samples
        model.state = "degraded"
        async with httpx.AsyncClient(base_url=server.url) as http:
            health = await http.get("/health")
            assert health.status_code == 503 and health.json()["detail"] == "as told"
            assert '\ntreadle:healthy{model_name="scripted"} 0.0\n' in (await http.get("/metrics")).text


@pytest.mark.asyncio
async def test_the_real_model_says_the_same_over_http(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    async with HttpServer(llm, "127.0.0.1:0") as server, async_client(server.url) as api:
        expected = await llm.chat(messages, params).final()
        ask: dict[str, Any] = {"model": "smollm2-135m", "messages": messages, "temperature": 0, "max_tokens": 24}
        whole = await api.chat.completions.create(**ask)
        assert whole.choices[0].message.content == expected.text and "Paris" in expected.text
        pieces = [chunk async for chunk in await api.chat.completions.create(stream=True, **ask)]
        assert len(pieces) > 5
        assert "".join(c.choices[0].delta.content or "" for c in pieces) == expected.text
        answer = await api.responses.create(model="smollm2-135m", input=messages[0]["content"], temperature=0)
        assert "Paris" in answer.output_text and answer.status == "completed"
        score = await api.completions.create(
            model="smollm2-135m", prompt="The capital of France is Paris", echo=True, logprobs=1, max_tokens=0
        )
        assert score.choices[0].logprobs is not None and score.choices[0].logprobs.tokens is not None
        assert score.choices[0].logprobs.tokens[-1] == " Paris"
        assert (
            score.choices[0].logprobs.token_logprobs is not None and score.choices[0].logprobs.token_logprobs[-1] > -1
        )


def test_wrong_options_are_told_before_a_model_is_loaded(tmp_path: Path, tiny: Path) -> None:
    endpoint = f"ipc://{tmp_path / 'd' / 'x.ipc'}"
    serve = ("serve", str(tiny), "--endpoint", endpoint)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        wrong = [
            ((*serve, "--http", address), "in use"),
            (("gateway", endpoint, "--http", address), "in use"),
            ((*serve, "--http", "8000"), "HOST:PORT"),
            ((*serve, "--api-keys", "file"), "--http"),
            (("gateway", endpoint), "--http"),
            (("gateway", "udp://x", "--http", "127.0.0.1:0"), "endpoint"),
            (("gateway", endpoint, "--http", "127.0.0.1:0", "--api-keys", "/no/such/file"), "No such file"),
            (("gateway", endpoint, "--http", "127.0.0.1:0", "--api-keys", str(tiny / "config.json")), "chmod 600"),
        ]
        for (arguments, said), done in zip(wrong, ended(*(arguments for arguments, _ in wrong)), strict=True):
            assert done.code == 2 and "Traceback" not in done.stderr, done.stderr
            assert said in done.stderr, arguments


def test_where_the_extra_is_not_installed_it_is_said(tmp_path: Path, tiny: Path) -> None:
    """The packages are hidden from the program."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Hiding(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        hidden = name.split('.')[0] in ('starlette', 'uvicorn')\n"
        "        return None if hidden else PathFinder.find_spec(name, path, target)\n"
        "sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    paths = f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    endpoint = f"ipc://{tmp_path / 'd' / 'x.ipc'}"
    for command in (("serve", str(tiny), "--endpoint", endpoint), ("gateway", endpoint)):
        done = run("-m", "treadle", *command, "--http", "127.0.0.1:0")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "pip install 'treadle[http]'" in done.stderr and "starlette, uvicorn" in done.stderr
    done = run("-c", "from treadle.http import HttpServer")
    assert "ConfigError: the HTTP gateway needs starlette, uvicorn: pip install 'treadle[http]'" in done.stderr


def test_the_extra_is_not_imported_before_it_is_used() -> None:
    program = (
        "import sys, treadle, treadle.commands, treadle.serve, treadle.cli\n"
        "sys.exit({'starlette', 'uvicorn', 'prometheus_client', 'httptools'} & {*sys.modules} or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_addresses_and_key_files(tmp_path: Path) -> None:
    for wrong in ("", "x", "127.0.0.1", ":80", "127.0.0.1:99999", "127.0.0.1:x", "no.such.host.invalid:1"):
        with pytest.raises(ConfigError):
            listen(wrong)
    with listen("127.0.0.1:0") as held, pytest.raises(EndpointInUse):
        listen(f"127.0.0.1:{held.getsockname()[1]}")
    keys = tmp_path / "keys"
    keys.write_text(" a \n#b\n\nc  ann\nc ann\n")
    with pytest.raises(ConfigError, match="chmod"):
        keys.chmod(0o644)
        read_key_file(keys)
    keys.chmod(0o600)
    assert read_key_file(keys) == {"a": "", "c": "ann"}
    for wrong, said in (("a b c\n", "line 1: KEY or KEY TENANT"), ("a b\n\na c\n", "line 3: .* another tenant")):
        keys.write_text(wrong)
        with pytest.raises(ConfigError, match=said):
            read_key_file(keys)
    keys.write_text("a " + "x" * 257)
    with pytest.raises(ConfigError, match="of at most 256"):
        read_key_file(keys)
    keys.write_text("# none\n")
    with pytest.raises(ConfigError, match="no key"):
        read_key_file(keys)
    assert reachable("tcp://0.0.0.0:5") == reachable("tcp://*:5") == "tcp://127.0.0.1:5"
    assert reachable("ipc:///a") == "ipc:///a"
