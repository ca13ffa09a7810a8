"""Many streams, clients that leave, and bounds: nothing is left over, and everybody is told in time."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from treadle import Client
from treadle.transport.messages import Stats

from .httpkit import async_client, client, metrics
from .servekit import Server, serving

# A longer run: TREADLE_DISCONNECTS=1000 pytest tests/test_http_load.py
DISCONNECTS = int(os.environ.get("TREADLE_DISCONNECTS", "120"))
AT_ONCE = 40
LONG: dict[str, Any] = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    keys = directory / "keys"
    keys.write_text("# two keys\nsk-one\n\nsk-two\n")
    keys.chmod(0o600)
    options = ("--http", "127.0.0.1:0", "--model-name", "tiny", "--api-keys", str(keys), "--dtype", "float32")
    with serving(directory, tiny, *options, "--max-num-seqs", "64", "--debug") as started:
        yield started


async def idle(server: Server) -> Stats:
    """The service's figures once nothing runs or waits."""
    async with Client(server.endpoint) as direct, asyncio.timeout(30):
        while (stats := await direct.stats()).running or stats.waiting:
            await asyncio.sleep(0.05)
    return stats


def request_bytes(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-one\r\nContent-Length: {len(data)}\r\n"
    )
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + data


async def leave(server: Server, draw: random.Random) -> None:
    """Asks, and closes the connection at a random moment: before the body has arrived, waiting, or in the stream."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    whole = request_bytes({**LONG, "stream": draw.random() < 0.8, "n": draw.choice([1, 1, 3])})
    cut = len(whole) if draw.random() < 0.9 else draw.randrange(len(whole))
    writer.write(whole[:cut])
    await writer.drain()
    read = 0
    until = draw.choice([0, 0, 1, 300, 3000])
    while cut == len(whole) and read < until:
        try:
            async with asyncio.timeout(1.0):  # an answer that is not streamed does not begin
                chunk = await reader.read(1000)
        except TimeoutError:
            break
        read += len(chunk)
        if not chunk:
            break
    writer.transport.abort()


@pytest.mark.asyncio
@pytest.mark.timeout(900)
async def test_clients_that_disconnect_leave_nothing(server: Server) -> None:
    before = metrics(server.url)
    draw = random.Random(0)
    left = DISCONNECTS
    while left:
        batch = min(AT_ONCE, left)
        await asyncio.gather(*(leave(server, draw) for _ in range(batch)))
        left -= batch
    stats = await idle(server)
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    after = metrics(server.url)
    assert after["treadle:http_open_requests"] == 0
    assert after["treadle:http_disconnects_total"] > before["treadle:http_disconnects_total"] + DISCONNECTS / 2
    aborted = 'treadle:request_success_total{finished_reason="abort",model_name="tiny"}'
    assert after[aborted] > before.get(aborted, 0) + DISCONNECTS / 2, "they ended by themselves"
    generated = after['treadle:generation_tokens_total{model_name="tiny"}']
    generated -= before['treadle:generation_tokens_total{model_name="tiny"}']
    assert generated < DISCONNECTS * 400 / 2, "they were generated to their ends"


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_ends_the_generation(server: Server, stream: bool) -> None:
    """Whether it was streamed or not, whether it ran or waited."""
    async with Client(server.endpoint) as direct:
        before = (await idle(server)).generated_tokens
        async with async_client(server.url, "sk-one") as api:
            ask: dict[str, Any] = {**LONG, "n": 64, "prompt": ["Hello", "you"], "max_tokens": 480, "stream": stream}
            asking = asyncio.create_task(api.post("/completions", body={"model": "tiny", **ask}, cast_to=object))
            while (await direct.stats()).generated_tokens < before + 64 * 10:
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        stats = await idle(server)
    assert stats.generated_tokens - before < 64 * 480, "it went on to its end"
    assert stats.blocks_used == 0


@pytest.mark.asyncio
async def test_waiting_and_running_streams_all_end_right(server: Server) -> None:
    """64 run, 256 wait behind them, all at once; afterwards each has its own whole answer."""
    lengths = {i: 3 + i % 7 for i in range(320)}
    async with async_client(server.url, "sk-two") as api:

        async def read(i: int) -> tuple[str, str | None, int]:
            text, reason, written = "", None, 0
            fields: dict[str, Any] = {"ignore_eos": True}
            stream = await api.completions.create(
                model="tiny",
                prompt=f"{i}",
                temperature=0,
                max_tokens=lengths[i],
                stream=True,
                stream_options={"include_usage": True},
                extra_body=fields,
                timeout=120,
            )
            async for chunk in stream:
                written = chunk.usage.completion_tokens if chunk.usage else written
                for choice in chunk.choices:
                    text += choice.text
                    reason = choice.finish_reason or reason
            return text, reason, written

        together = await asyncio.gather(*(read(i) for i in lengths))
        assert [(reason, written) for _, reason, written in together] == [("length", n) for n in lengths.values()]
        for i in (0, 63, 64, 200, 319):
            assert (await read(i))[0] == together[i][0]
    assert (await idle(server)).blocks_used == 0


@pytest.mark.asyncio
async def test_a_reader_that_stops_reading_holds_up_nobody(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    writer.write(request_bytes({**LONG, "stream": True, "logprobs": 20, "n": 8}))
    async with async_client(server.url, "sk-one") as api:
        for _ in range(5):
            answer = await api.completions.create(
                model="tiny", prompt="a", max_tokens=5, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None and answer.usage.completion_tokens == 5
        await idle(server)  # its rows are free, though it has not read
    writer.transport.abort()


def test_keys(server: Server) -> None:
    for key in ("sk-one", "sk-two"):
        with client(server.url, key) as api:
            assert api.models.list().data
    for key in ("sk-three", "sk-on", "sk-one,sk-two", "# two keys"):
        with client(server.url, key) as api, pytest.raises(openai.AuthenticationError) as denied:
            api.models.list()
        assert denied.value.code == "invalid_api_key"
    with httpx.Client(base_url=server.url) as http:
        for path in ("/v1/models", "/v1/models/tiny"):
            assert http.get(path).status_code == 401
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"):
            assert http.post(path, json={}).status_code == 401, path
        assert http.get("/v1/models", headers={"authorization": "Basic sk-one"}).status_code == 401
        for path in ("/health", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200


@pytest.mark.asyncio
async def test_overload_is_refused_before_a_stream_begins(tiny: Path, tmp_path: Path) -> None:
    """Two bounds: the service's on what waits, and the gateway's on what is open."""
    options = (
        "--http",
        "127.0.0.1:0",
        "--max-num-seqs",
        "1",
        "--max-waiting-requests",
        "1",
        "--max-open-requests",
        "3",
    )
    with serving(tmp_path / "server", tiny, *options, "--dtype", "float32") as server:
        async with async_client(server.url) as api:
            body = {"ignore_eos": True}
            ask: dict[str, Any] = {"model": str(tiny), "prompt": "a", "max_tokens": 400, "extra_body": body}
            running = await api.completions.create(stream=True, **ask)
            await anext(aiter(running))
            waiting = asyncio.create_task(api.completions.create(stream=True, **ask))
            async with Client(server.endpoint) as direct:
                while not (await direct.stats()).waiting:
                    await asyncio.sleep(0.01)
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as refused:
                    await api.completions.create(stream=stream, **ask)
                assert refused.value.code == "overloaded"
                assert int(refused.value.response.headers["retry-after"]) >= 1
            assert metrics(server.url)[f'treadle:requests_refused_total{{model_name="{tiny}",reason="queue"}}'] == 2
            await running.close()
            await (await waiting).close()
        assert (await idle(server)).blocks_used == 0


@pytest.mark.asyncio
async def test_too_many_open_requests_are_refused(tiny: Path, tmp_path: Path) -> None:
    options = ("--http", "127.0.0.1:0", "--model-name", "tiny", "--max-num-seqs", "1", "--max-open-requests", "2")
    with serving(tmp_path / "server", tiny, *options, "--dtype", "float32") as server:
        async with async_client(server.url) as api:
            ask: dict[str, Any] = {
                "model": "tiny",
                "prompt": "a",
                "max_tokens": 400,
                "extra_body": {"ignore_eos": True},
            }
            first = asyncio.create_task(api.completions.create(**ask))
            second = asyncio.create_task(api.completions.create(**ask))
            while metrics(server.url)["treadle:http_open_requests"] < 2:
                await asyncio.sleep(0.01)
            with pytest.raises(openai.RateLimitError) as refused:
                await api.completions.create(**ask)
            assert refused.value.response.headers["retry-after"] == "1"
            first.cancel()
            second.cancel()
            await asyncio.gather(first, second, return_exceptions=True)
        assert (await idle(server)).blocks_used == 0
