"""Real server processes for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


class Server:
    """A `treadle serve` that has said it is ready. Its standard error is in `log`; `url`: of its gateway.

    endpoint: "default" is the one that it takes by itself.
    """

    def __init__(self, directory: Path, model: str | Path, *arguments: str, endpoint: str = "") -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        self.log = directory / "server.log"
        self.runtime = Path(tempfile.mkdtemp(prefix="r-"))  # `directory` may be too long for more sockets
        self.endpoint = endpoint or f"ipc://{directory / 'service.ipc'}"
        command = [sys.executable, "-m", "treadle", "serve", str(model), *arguments]
        if endpoint == "default":
            self.endpoint = f"ipc://{self.runtime}/treadle/default.ipc"
        else:
            command += ["--endpoint", self.endpoint]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "XDG_RUNTIME_DIR": str(self.runtime)},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line == f"treadle: ready on {self.endpoint}\n", f"{line}{self.log.read_text()}"
        self.url = ""
        if "--http" in arguments:
            self.url = self.process.stdout.readline().decode().removeprefix("treadle: ready on ").strip()
            assert self.url.startswith("http://"), f"{self.url}{self.log.read_text()}"
        assert any(self.runtime.iterdir()), "its files are elsewhere, and nobody would see them left"

    @property
    def ranks(self) -> list[int]:
        """Process ids of the engine ranks."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if "treadle.engine" in child.cmdline()]

    @property
    def files(self) -> list[str]:
        """What the server has in its runtime directory and at its endpoint."""
        made = [str(path) for path in self.runtime.rglob("*")]
        path = Path(self.endpoint.removeprefix("ipc://"))
        return made + [str(path)] * path.exists()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(30)


@contextmanager
def serving(directory: Path, model: str | Path, *arguments: str, endpoint: str = "") -> Iterator[Server]:
    server = Server(directory, model, *arguments, endpoint=endpoint)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
