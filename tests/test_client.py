"""`Client` against a real server process: the embedded API over a socket."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from treadle import Client, SamplingParams
from treadle.errors import (
    ConfigError,
    HandshakeFailed,
    InvalidParameter,
    InvalidRequest,
    PromptTooLong,
    ServerLost,
    ServiceClosed,
)
from treadle.remote import RemoteBackend
from treadle.transport.codec import client_codec
from treadle.transport.endpoints import connect_client, write_keys
from treadle.transport.messages import Deltas, InfoRequest, Ping, Pong, Refused, Stats, Submit

from .conftest import eventually
from .servekit import Server, serving

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
ENDLESS = SamplingParams(temperature=1.0, seed=1, max_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    with serving(directory, tiny, "--tensor-parallel-size", "2", "--dtype", "float32", "--debug") as started:
        yield started
        assert started.process.poll() is None, "the server did not survive its tests"


@pytest.mark.asyncio
async def test_the_methods_of_the_embedded_api(server: Server) -> None:
    async with Client(server.endpoint) as client:
        assert client.server.world_size == 2
        ids = client.tokenize("Hello")
        assert client.detokenize(ids) == "Hello"
        outputs = [output async for output in client.generate("Hello", GREEDY)]
        assert len(outputs) > 1
        assert "".join(output.delta for output in outputs) == outputs[-1].text
        assert len(outputs[-1].token_ids) == 16
        chat = await client.chat([{"role": "user", "content": "Hi"}], GREEDY).final()
        assert len(chat.token_ids) == 16
        stats = await client.stats()
        assert stats.generated_tokens >= 32 and stats.blocks_used == 0
        assert (await client.health()).state == "ready"


def test_the_client_needs_neither_torch_nor_model_files(server: Server, tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from treadle import Client, SamplingParams
async def main():
    async with Client({server.endpoint!r}) as client:
        output = await client.generate("Hello", SamplingParams(temperature=0, max_tokens=4)).final()
        assert output.text
asyncio.run(main())
assert "torch" not in sys.modules and "treadle.engine.model" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=60)


def test_the_blocking_form(server: Server) -> None:
    with Client(server.endpoint) as client:
        assert [len(output.token_ids) for output in client.generate_sync(["a", "bc"], GREEDY)] == [16, 16]


@pytest.mark.asyncio
async def test_many_clients_at_once_get_their_own_answers(server: Server) -> None:
    async def ask(i: int) -> list[int]:
        async with Client(server.endpoint) as client:
            streams = [client.generate([i, j], GREEDY, request_id=f"same-{j}") for j in range(1, 4)]
            return [token for stream in streams for token in (await stream.final()).token_ids]

    together = await asyncio.gather(*(ask(i) for i in range(8)))
    alone = [await ask(i) for i in range(8)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 8


@pytest.mark.asyncio
async def test_refusals_are_the_same_types_as_embedded(server: Server) -> None:
    async with Client(server.endpoint) as client:
        with pytest.raises(PromptTooLong):
            await client.generate([1] * 5000, GREEDY).final()
        with pytest.raises(InvalidParameter):
            client.generate("a", SamplingParams(temperature=-1.0))
        assert len((await client.generate("a", GREEDY).final()).token_ids) == 16


@pytest.mark.asyncio
async def test_a_client_that_goes_leaves_nothing_running(server: Server) -> None:
    async with Client(server.endpoint) as watcher:
        async with Client(server.endpoint) as client:
            streams = [client.generate("a", ENDLESS) for _ in range(4)]
            await anext(streams[0])
        del streams
        async with asyncio.timeout(30):  # at the latest when the server misses its pings
            while (await watcher.stats()).running:
                await asyncio.sleep(0.05)
        assert (await watcher.stats()).blocks_used == 0


async def refused(endpoint: str, **options: Any) -> str:
    """What the error of a Client that cannot connect says; half the time that it would have is far too long."""
    async with asyncio.timeout(30):
        with pytest.raises((ServerLost, HandshakeFailed)) as caught:
            async with Client(endpoint, connect_timeout=60, **options):
                pass
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose paths fit into a socket's address."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        yield Path(directory)


@pytest.mark.asyncio
async def test_no_socket_is_said_at_once_with_what_to_do(short: Path) -> None:
    said = await refused(f"ipc://{short / 'nobody'}")
    assert said.startswith(f"ServerLost: ipc://{short}/nobody: there is no such socket")
    assert f"start one with `treadle serve MODEL --endpoint ipc://{short}/nobody`" in said


@pytest.mark.asyncio
async def test_a_socket_that_nobody_listens_on_is_said_at_once(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(short / "left"))
    assert "its socket is left from one that ended" in await refused(f"ipc://{short / 'left'}")
    (short / "file").touch()
    assert "not a socket" in await refused(f"ipc://{short / 'file'}")
    key = zmq.curve_keypair()[0].decode()
    assert "the connection was refused" in await refused(f"tcp://127.0.0.1:{free_port()}", server_key=key)
    assert "host is not known" in await refused("tcp://no-such-host.invalid:5555", server_key=key)


@pytest.mark.asyncio
async def test_another_program_at_the_endpoint_is_told_apart(short: Path) -> None:
    key = zmq.curve_keypair()[0].decode()

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_unix_server(answer, short / "web"):
        assert "not a treadle server" in await refused(f"ipc://{short / 'web'}")
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as web:
        port = web.sockets[0].getsockname()[1]
        said = await refused(f"tcp://127.0.0.1:{port}", server_key=key)
        assert said.startswith("HandshakeFailed") and "not a treadle server" in said


@pytest.mark.asyncio
async def test_a_wrong_key_is_said_at_once() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.curve_server = True
    router.curve_publickey, router.curve_secretkey = zmq.curve_keypair()
    port = router.bind_to_random_port("tcp://127.0.0.1")
    said = await refused(f"tcp://127.0.0.1:{port}", server_key=zmq.curve_keypair()[0].decode())
    assert said.startswith("HandshakeFailed") and "server_key (--server-key) is not its public key" in said
    context.destroy(linger=0)


@pytest.mark.asyncio
async def test_who_listens_and_never_answers_is_waited_for(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(short / "mute"))
        mute.listen()
        with pytest.raises(ServerLost, match=r"no answer within 0\.3 s; .* connect_timeout"):
            async with Client(f"ipc://{short / 'mute'}", connect_timeout=0.3):
                pass


def test_options_of_a_client_are_checked_at_once() -> None:
    with pytest.raises(ConfigError, match="allowed are"):
        Client("carrier-pigeon://roof")
    with pytest.raises(ConfigError, match="CURVE"):
        Client("tcp://127.0.0.1:5555")
    for seconds in (0, -1.0, float("nan"), float("inf"), "ten", True, None):
        with pytest.raises(ConfigError, match="connect_timeout"):
            Client(connect_timeout=seconds)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="lost_after"):
            Client(lost_after=seconds)  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_hostile_frames_are_counted_answered_and_harmless(server: Server) -> None:
    codec = client_codec()
    context: zmq.asyncio.Context = zmq.asyncio.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(server.endpoint)
    hostile = [b"", b"\xff" * 100, b"\x80\x04\x95.", msgspec.msgpack.encode(["Submit", {}]), b"\x91" * 5000]
    for frame in hostile:
        await raw.send(frame)
        answer = codec.decode(await asyncio.wait_for(raw.recv(), 10))
        assert isinstance(answer, Refused) and answer.code == "protocol_error"
    await raw.send_multipart([b"two", b"frames"])
    assert isinstance(codec.decode(await asyncio.wait_for(raw.recv(), 10)), Refused)
    bad = [
        Submit(id="a", tokens=b"abc", params=GREEDY),
        Submit(id="a", tokens=b"", params=GREEDY),
        Submit(id="a", tokens=b"\x01\x00\x00\x00", params=SamplingParams(temperature=-2.0)),
        InfoRequest("a", "passwords"),
    ]
    for message in bad:
        await raw.send(codec.encode(message))
        answer = codec.decode(await asyncio.wait_for(raw.recv(), 10))
        assert isinstance(answer, Refused) and answer.id == "a", answer
    await raw.send(codec.encode(Ping(5)))
    assert isinstance(codec.decode(await asyncio.wait_for(raw.recv(), 10)), Pong)
    await raw.send(codec.encode(Submit(id="good", tokens=b"\x01\x00\x00\x00", params=GREEDY)))
    tokens = 0
    while tokens < 16:
        answer = codec.decode(await asyncio.wait_for(raw.recv(), 10))
        assert isinstance(answer, Deltas)
        tokens += len(answer.tokens) + sum(len(delta.tokens) for delta in answer.items)
    await raw.send(codec.encode(InfoRequest("s", "stats")))
    stats = codec.decode(await asyncio.wait_for(raw.recv(), 10))
    assert isinstance(stats, Stats) and stats.bad_frames >= len(hostile) + 1
    context.destroy(linger=0)


@pytest.mark.asyncio
async def test_a_restarted_server_is_another_one(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "one", tiny) as first:
        async with Client(first.endpoint, lost_after=60.0) as client:
            stream = client.generate("a", ENDLESS)
            await anext(stream)
            first.process.kill()
            first.process.wait()
            with serving(tmp_path / "one", tiny, endpoint=first.endpoint):
                with pytest.raises(ServerLost, match=r"restarted|open requests are gone"):
                    await stream.final()
                assert len((await client.generate("a", GREEDY).final()).token_ids) == 16


@pytest.mark.asyncio
async def test_a_server_that_was_killed_is_lost_and_not_waited_for(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "one", tiny) as server:
        async with (
            Client(server.endpoint, lost_after=1.0) as short,
            Client(server.endpoint, lost_after=600.0, connect_timeout=600.0) as long,
            asyncio.timeout(60),
        ):
            silent, ended = short.generate("a", ENDLESS), long.generate("a", ENDLESS)
            await anext(silent)
            await anext(ended)
            server.process.kill()
            with pytest.raises(ServerLost, match="silent for 1 s"):
                await silent.final()
            with pytest.raises(ServerLost, match="the server has ended"):
                await ended.final()
            with pytest.raises(ServerLost, match="the server has ended"):
                await long.stats()


@pytest.mark.asyncio
async def test_a_server_that_stands_still_is_not_taken_for_gone(server: Server) -> None:
    async with Client(server.endpoint, lost_after=600.0) as client:
        looked = asyncio.Event()
        backend = client._made
        assert isinstance(backend, RemoteBackend)
        real = backend._look

        async def look() -> None:
            await real()
            looked.set()

        backend._look = look  # type: ignore[method-assign]
        stream = client.generate("a", ENDLESS)
        await anext(stream)
        server.process.send_signal(signal.SIGSTOP)
        try:
            async with asyncio.timeout(30):
                await looked.wait()
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert len((await stream.final()).token_ids) == 200


@pytest.mark.asyncio
async def test_tcp_with_curve_keys(tiny: Path, tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys")
    port = free_port()
    endpoint = f"tcp://127.0.0.1:{port}"
    with serving(tmp_path / "one", tiny, "--keys", str(tmp_path / "keys"), endpoint=endpoint):
        async with Client(endpoint, server_key=keys.public) as client:
            assert len((await client.generate("a", GREEDY).final()).token_ids) == 16
        wrong = write_keys(tmp_path / "other").public
        assert "is not its public key" in await refused(endpoint, server_key=wrong)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        plain = context.socket(zmq.DEALER)
        plain.connect(endpoint)
        plain.send(client_codec().encode(Ping(1)))
        assert not plain.poll(500), "a client without keys was answered"
        context.destroy(linger=0)
        with pytest.raises(ConfigError):
            connect_client(plain, endpoint, None)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_an_endpoint_in_use_is_said_before_a_model_is_loaded(server: Server, tiny: Path) -> None:
    command = [sys.executable, "-m", "treadle", "serve", str(tiny), "--endpoint", server.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "EndpointInUse" in done.stderr and "another server listens there" in done.stderr
    eventually(lambda: server.process.poll() is None, "the first server goes on")


@pytest.mark.asyncio
async def test_a_request_that_is_too_long_for_the_wire_is_refused_at_home(server: Server) -> None:
    async with Client(server.endpoint) as client:
        fine = client.generate("a", GREEDY)
        with pytest.raises(InvalidRequest, match="bytes"):
            client.generate([1] * 5_000_000, GREEDY)
        assert len((await fine.final()).token_ids) == 16


@pytest.mark.asyncio
async def test_a_client_that_was_cut_off_learns_it(server: Server) -> None:
    """Its requests are gone: a new session answers its ping, and nobody waits for ever."""
    async with Client(server.endpoint, lost_after=60.0) as client:
        stream = client.generate("a", ENDLESS)
        await anext(stream)
        client._made._met("as the server says after it dropped the session")  # type: ignore[union-attr]
        with pytest.raises(ServerLost, match="lost this client"):
            await stream.final()
        assert len((await client.generate("a", GREEDY).final()).token_ids) == 16


@pytest.mark.asyncio
async def test_a_server_that_is_stopped_says_so(tiny: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "one", tiny, "--drain-timeout", "0") as server:
        async with Client(server.endpoint, lost_after=60.0) as client:
            stream = client.generate("a", ENDLESS)
            await anext(stream)
            server.process.terminate()
            with pytest.raises(ServiceClosed, match="stopped"):
                await stream.final()
