"""Where sockets may live."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from treadle.errors import ConfigError, EndpointInUse
from treadle.transport.endpoints import (
    RuntimeDir,
    bind_server,
    check_scheme,
    connect_client,
    read_keys,
    write_keys,
)


@pytest.fixture
def router() -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.ROUTER)
    yield sock
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "endpoint",
    ["", "ipc://relative", "tcp://nohost", "tcp://host:0", "tcp://host:99999", "http://x:1", "inproc://x", "tcp://:5"],
)
def test_other_endpoints_are_refused_with_what_is_allowed(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        check_scheme(endpoint)


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="longer than"):
        check_scheme("ipc:///" + "x" * 120)


def test_the_directory_is_made_private_and_the_socket_too(tmp_path: Path, router: zmq.Socket[bytes]) -> None:
    path = tmp_path / "new" / "service.ipc"
    bind_server(router, f"ipc://{path}", None)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_an_open_directory_is_refused(tmp_path: Path, router: zmq.Socket[bytes]) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="0700, not 0755"):
        bind_server(router, f"ipc://{tmp_path / 'service.ipc'}", None)


def test_an_endpoint_that_answers_is_not_taken_over(tmp_path: Path, router: zmq.Socket[bytes]) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "service.ipc"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(EndpointInUse, match="another server"):
            bind_server(router, f"ipc://{path}", None)
    bind_server(router, f"ipc://{path}", None)  # a dead server's file is no obstacle


def test_a_file_that_is_not_a_socket_is_left_alone(tmp_path: Path, router: zmq.Socket[bytes]) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "thesis.txt"
    path.write_text("ten years of work")
    with pytest.raises(ConfigError, match="not a socket"):
        bind_server(router, f"ipc://{path}", None)
    assert path.read_text() == "ten years of work"


@pytest.mark.parametrize("key", ["", "short", "x" * 39 + '"', "é" * 40, b"x" * 40, 5])
def test_keys_that_are_none_are_refused(router: zmq.Socket[bytes], key: object) -> None:
    with pytest.raises(ConfigError, match="40 characters"):
        connect_client(router, "tcp://127.0.0.1:45001", key)  # type: ignore[arg-type]


def test_every_address_is_none_to_connect_to(router: zmq.Socket[bytes]) -> None:
    with pytest.raises(ConfigError, match="name the host"):
        connect_client(router, "tcp://*:45001", "x" * 40)


def test_tcp_needs_keys(router: zmq.Socket[bytes]) -> None:
    with pytest.raises(ConfigError, match="CURVE"):
        bind_server(router, "tcp://127.0.0.1:45001", None)
    with pytest.raises(ConfigError, match="CURVE"):
        connect_client(router, "tcp://127.0.0.1:45001", None)
    with pytest.raises(ConfigError, match="40 characters"):
        connect_client(router, "tcp://127.0.0.1:45001", "short")


def test_a_port_in_use_is_named(tmp_path: Path, router: zmq.Socket[bytes]) -> None:
    keys = write_keys(tmp_path / "keys")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EndpointInUse, match=str(port)):
            bind_server(router, f"tcp://127.0.0.1:{port}", keys)


def test_keys_are_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = write_keys(path)
    assert read_keys(path) == keys
    with pytest.raises(ConfigError, match="exists"):
        write_keys(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_keys(path)
    path.chmod(0o600)
    path.write_text("nonsense")
    with pytest.raises(ConfigError, match="expected lines"):
        read_keys(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(tmp_path / "missing")


def test_the_runtime_directory_is_private_and_goes_away() -> None:
    runtime = RuntimeDir()
    assert stat.S_IMODE(runtime.path.stat().st_mode) == 0o700
    assert runtime.path.stat().st_uid == os.getuid()
    (runtime.path / "file").touch()
    runtime.remove()
    assert not runtime.path.exists()


def test_what_killed_services_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else: not what is in use, nor what others made under such a name."""
    base = Path(tempfile.mkdtemp(prefix="r-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    program = "from treadle.transport.endpoints import RuntimeDir as R; r = R(); print(r.path, flush=True); input()"
    killed = []
    for _ in range(2):
        child = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True)
        assert child.stdin is not None and child.stdout is not None
        killed.append(Path(child.stdout.readline().strip()))
        (killed[-1] / "shared-1").mkdir()
        assert [path for path in killed if path.exists()] == killed[-1:], "the first went when the second began"
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
    others = [base / "treadle-file", base / "treadle-0", base / "another"]
    others[0].touch()
    (others[1] / "inside").mkdir(parents=True)
    others[2].mkdir()
    first = RuntimeDir()
    second = RuntimeDir()
    assert set(base.iterdir()) == {first.path, second.path, *others}
    for made in (first, second, second):
        made.remove()
    assert set(base.iterdir()) == set(others)
    shutil.rmtree(base)
