"""Who may connect, and what a greedy, slow, dead or hostile client can do to the others: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from treadle import Client, SamplingParams
from treadle.commands import run
from treadle.errors import ConfigError, HandshakeFailed, Overloaded, ServerLost
from treadle.scheduler import client_server
from treadle.scheduler.client_limits import Allowance, ClientLimits
from treadle.scheduler.client_server import ClientServer
from treadle.transport.allow_list import read_allow_list
from treadle.transport.codec import client_codec, pack
from treadle.transport.endpoints import ServerKeys, read_keys, write_keys
from treadle.transport.messages import Drain, Guided, Ping, Refused, Reload, Submit

from .faultkit import PROMPTS, Faulty, faulty, params, undisturbed

LONG = SamplingParams(max_tokens=450, seed=1)


def free_tcp() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@asynccontextmanager
async def served(
    directory: Path,
    *,
    tcp: ServerKeys | None = None,
    limits: ClientLimits | None = None,
    allowed: list[str] | None = None,
    pace: float = 0.0,
) -> AsyncIterator[tuple[Faulty, str]]:
    """A service without a model, in this process, and the endpoint it is served on."""
    async with faulty(directory, pace=pace, max_num_seqs=64) as f:
        assert f.service._runtime is not None
        endpoint = free_tcp() if tcp is not None else f"ipc://{f.service._runtime.path}/clients.ipc"
        server = ClientServer(f.service, endpoint, tcp, limits=limits, allowed=allowed)
        try:
            yield f, endpoint
        finally:
            server.close()


async def exact(client: Client, i: int = 0) -> bool:
    output = await client.generate(PROMPTS[i], params(i)).final()
    return output.token_ids == undisturbed(PROMPTS[i], params(i))


@pytest.mark.asyncio
async def test_only_clients_on_the_list_are_let_in(tmp_path: Path) -> None:
    server, known, stranger = (write_keys(tmp_path / name) for name in ("server", "known", "stranger"))
    async with served(tmp_path, tcp=server, allowed=[known.public]) as (_, endpoint):
        async with Client(endpoint, server_key=server.public, keys=tmp_path / "known") as client:
            assert await exact(client)
            for keys in (tmp_path / "stranger", None):
                with pytest.raises(HandshakeFailed):
                    async with Client(endpoint, server_key=server.public, keys=keys, connect_timeout=20):
                        pass
            assert await exact(client)
        assert stranger.public != known.public


@pytest.mark.asyncio
async def test_without_a_list_whoever_knows_the_servers_key_may_come(tmp_path: Path) -> None:
    server = write_keys(tmp_path / "server")
    async with served(tmp_path, tcp=server) as (_, endpoint), Client(endpoint, server_key=server.public) as client:
        assert await exact(client)


def test_lists_of_keys_are_read_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = write_keys(tmp_path / "a.keys")
    listed = tmp_path / "clients"
    listed.write_text(f"{keys.public} the laptop\n\n{write_keys(tmp_path / 'b.keys').public}\n")
    assert len(read_allow_list(listed)) == 2 and read_allow_list(listed)[0] == keys.public
    assert run(["keys", "--list", str(tmp_path / "a.keys"), str(listed)]) == 0
    shown = capsys.readouterr().out
    assert shown.count(keys.public) == 2 and keys.secret not in shown
    for text, says in (("nonsense", "not a public key"), ("", "no key")):
        listed.write_text(text)
        with pytest.raises(ConfigError, match=says):
            read_allow_list(listed)
    with pytest.raises(ConfigError, match="No such file"):
        read_allow_list(tmp_path / "nothing")
    (tmp_path / "a.keys").chmod(0o644)
    assert run(["keys", "--list", str(tmp_path / "a.keys")]) == 2, "a secret that others may read is no key file"
    assert run(["serve", "--endpoint", f"ipc://{tmp_path}/x", "--allow", str(tmp_path / "b.keys")]) == 2
    with pytest.raises(ConfigError):
        read_keys(tmp_path / "a.keys")


@pytest.mark.asyncio
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
async def test_a_socket_of_another_user_is_not_connected_to(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, endpoint):
        path = endpoint.removeprefix("ipc://")
        os.chown(path, 12345, -1)
        with pytest.raises(ConfigError, match="belongs to user 12345"):
            async with Client(endpoint):
                pass
        os.chown(path, os.getuid(), -1)
        async with Client(endpoint) as client:
            assert await exact(client)


@pytest.mark.asyncio
async def test_a_greedy_client_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    limits = ClientLimits(requests=3, prompt_bytes=400)
    async with (
        served(tmp_path, limits=limits, pace=0.002) as (f, endpoint),
        Client(endpoint) as greedy,
        Client(endpoint) as other,
    ):
        streams = [greedy.generate([1], LONG) for _ in range(5)]
        for stream in streams[3:]:
            with pytest.raises(Overloaded, match="3 requests open"):
                await stream.final()
        assert await exact(other)
        for stream in streams[:3]:
            await stream.aclose()
        async with asyncio.timeout(20):
            while f.service.unfinished:
                await asyncio.sleep(0.01)
        assert await exact(greedy), "what has ended counts no more"
        first = greedy.generate([1] * 60, LONG)
        await anext(first)
        with pytest.raises(Overloaded, match="bytes"):
            await greedy.generate([1] * 60, LONG).final()
        await first.aclose()
        async with asyncio.timeout(20):
            while f.service.unfinished:
                await asyncio.sleep(0.01)
        await anext(greedy.generate([1] * 60, LONG))


@pytest.mark.asyncio
async def test_a_flood_of_messages_is_refused_and_the_others_are_served(tmp_path: Path) -> None:
    async with served(tmp_path, limits=ClientLimits(messages_per_second=20.0)) as (_, endpoint):
        codec = client_codec()
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        raw = context.socket(zmq.DEALER)
        raw.connect(endpoint)
        for i in range(200):
            await raw.send(codec.encode(Submit(id=str(i), tokens=pack([1]), params=SamplingParams(max_tokens=1))))
        refused = 0
        async with Client(endpoint) as other:
            assert await exact(other)
        while refused < 100:
            answer = codec.decode(await asyncio.wait_for(raw.recv(), 10))
            if isinstance(answer, Refused):
                assert answer.code == Overloaded.code and answer.retry_after > 0
                refused += 1
        context.destroy(linger=0)


@pytest.mark.asyncio
async def test_requests_that_wait_for_their_grammars_are_bounded_too(tmp_path: Path) -> None:
    async with faulty(tmp_path, max_num_seqs=1, max_waiting_requests=1) as f:
        guided = SamplingParams(guided=Guided(regex="a+"))
        for name in ("a", "b"):
            f.submit(name, [1], guided)
        with pytest.raises(Overloaded, match="2 requests wait for their grammars"):
            f.submit("c", [1], guided)
        f.submit("plain", PROMPTS[0], params(0))
        await f.sink.ended("plain")


def test_a_token_bucket_fills_with_time() -> None:
    allowance = Allowance(ClientLimits(messages_per_second=10.0))
    for _ in range(20):
        allowance.message(0.0)
    with pytest.raises(Overloaded) as caught:
        allowance.message(0.0)
    assert 0 < caught.value.retry_after <= 0.1
    allowance.message(0.1)
    with pytest.raises(Overloaded):
        allowance.message(0.1)
    with pytest.raises(ConfigError, match="at least 1"):
        ClientLimits(requests=0)
    large = Allowance(ClientLimits(messages_per_second=10.0))
    large.message(0.0, size=160 << 10)
    large.answered(1 << 20)
    with pytest.raises(Overloaded) as caught:
        large.message(0.0)
    assert 5.5 < caught.value.retry_after < 5.7, "1 + 10 for what came, 64 for what went, of 20"
    large.message(6.0)


@pytest.mark.asyncio
async def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_server, "_SEND_HIGH_WATER", 2)
    async with served(tmp_path, limits=ClientLimits(backlog_bytes=20_000)) as (f, endpoint):
        codec = client_codec()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        raw = context.socket(zmq.DEALER)
        raw.rcvhwm = 1
        raw.setsockopt(zmq.RCVBUF, 2_000)
        raw.connect(endpoint)
        for i in range(60):
            wanted = SamplingParams(max_tokens=450, seed=i, logprobs=64)
            raw.send(codec.encode(Submit(id=str(i), tokens=pack([i]), params=wanted)))
        async with asyncio.timeout(30):
            while not f.service.unfinished:
                await asyncio.sleep(0.001)
            while f.service.unfinished:
                await asyncio.sleep(0.001)
        stats = f.service.stats()
        assert stats.generated_tokens < 60 * 450, "its requests ended early, with it"
        assert stats.blocks_used == 0
        async with Client(endpoint) as other:
            assert await exact(other)
        context.destroy(linger=0)


@pytest.mark.asyncio
async def test_a_server_that_stood_still_does_not_blame_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, or starved: nobody was silent, it did not listen."""
    monkeypatch.setattr(client_server, "_SILENCE_SECONDS", 1.5)
    async with served(tmp_path, pace=0.005) as (_, endpoint), Client(endpoint) as client:
        stream = client.generate(PROMPTS[0], params(0, 60))
        await anext(stream)
        time.sleep(2.0)  # noqa: ASYNC251  # this is what stands still
        assert (await stream.final()).token_ids == undisturbed(PROMPTS[0], params(0, 60))


@pytest.mark.asyncio
async def test_a_client_that_was_given_up_is_not_told_that_it_aborted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        served(tmp_path, pace=0.005) as (_, endpoint),
        Client(endpoint) as plain,
        Client(endpoint, resume=True) as resuming,
    ):
        streams = [client.generate(PROMPTS[0], params(0, 450)) for client in (plain, resuming)]
        for stream in streams:
            await anext(stream)
        monkeypatch.setattr(client_server, "_SILENCE_SECONDS", 0.0)
        with pytest.raises(ServerLost, match="lost this client"):
            await streams[0].final()
        monkeypatch.undo()
        assert (await streams[1].final()).token_ids == undisturbed(PROMPTS[0], params(0, 450))


@pytest.mark.asyncio
async def test_a_killed_client_takes_its_requests_with_it(tmp_path: Path) -> None:
    async with served(tmp_path, pace=0.02) as (f, endpoint):
        program = f"""
import asyncio
from treadle import Client, SamplingParams
async def main():
    async with Client({endpoint!r}) as client:
        stream = client.generate([1], SamplingParams(max_tokens=450))
        await anext(stream)
        print("running", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
        process = started(program)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"running\n"
        assert f.service.unfinished == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        async with asyncio.timeout(8):  # the rest of its tokens would take longer than that
            while f.service.unfinished:
                await asyncio.sleep(0.01)


def started(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)


@pytest.mark.asyncio
async def test_nobody_drains_or_reloads_over_tcp(tmp_path: Path) -> None:
    server = write_keys(tmp_path / "server")
    async with served(tmp_path, tcp=server) as (f, endpoint):
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        raw = context.socket(zmq.DEALER)
        raw.curve_serverkey = server.public.encode()
        raw.curve_publickey, raw.curve_secretkey = zmq.curve_keypair()
        raw.connect(endpoint)
        codec = client_codec()
        for message in (Drain("x", 1.0), Reload("x", "/etc/passwd")):
            await raw.send(codec.encode(message))
            answer = codec.decode(await asyncio.wait_for(raw.recv(), 10))
            assert isinstance(answer, Refused) and "on the server's own machine" in answer.message
        await raw.send(codec.encode(Ping(1)))
        await raw.recv()
        assert f.service.health().state == "ready"
        context.destroy(linger=0)
