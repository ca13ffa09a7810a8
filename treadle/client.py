"""`Client`: a service elsewhere, over ZeroMQ. Never imports torch and needs no model files."""

from __future__ import annotations

import uuid
from pathlib import Path

from treadle.errors import ConfigError, ModelError, ProtocolError, ServiceClosed
from treadle.transport.endpoints import check_client, default_endpoint, read_keys
from treadle.transport.messages import PROTOCOL_VERSION, ControlMessage, Drain, Reload, ServerInfo, TokenizerInfo

from .frontend import Frontend
from .remote import RemoteBackend
from .tokenizer import Tokenizer

_MAX_SECONDS = 1e6


class Client(Frontend):
    """The methods of `LLM` for a service that `treadle serve` started.

    ```
    async with Client("ipc:///run/user/1000/treadle/default.ipc") as client:
        async for output in client.chat([{"role": "user", "content": "Hello"}]):
            print(output.delta, end="", flush=True)
    ```

    endpoint: None is where `treadle serve` listens by default. server_key: the server's public CURVE key, for tcp.
    connect_timeout: seconds to wait for the server. lost_after: seconds of silence after which open requests end with
    ServerLost. resume: when the server ends or is restarted, keep open streams for `resume_timeout` seconds instead,
    and go on with them, from the tokens that they have, at whoever answers there. keys: of this client, a file that
    `treadle keys` made, for a server that only lets in whom it knows.

    Raises ConfigError here; on entering ServerLost when nobody is there, which is said at once, and HandshakeFailed
    when the key is not the server's, or this client's not among those that it lets in.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        server_key: str | None = None,
        connect_timeout: float = 10.0,
        lost_after: float = 10.0,
        resume: bool = False,
        resume_timeout: float = 120.0,
        keys: Path | None = None,
    ) -> None:
        super().__init__()
        self._endpoint = endpoint or default_endpoint()
        check_client(self._endpoint, server_key)
        self._server_key = server_key
        self._keys = read_keys(keys) if keys is not None else None
        self._connect_timeout = _seconds("connect_timeout", connect_timeout)
        self._lost_after = _seconds("lost_after", lost_after)
        timeout = _seconds("resume_timeout", resume_timeout)
        self._resume_timeout = timeout if resume else 0.0
        self._server: ServerInfo | None = None

    @property
    def server(self) -> ServerInfo:
        """What the server said of itself on connecting."""
        self._must_be_open()
        if self._server is None:
            raise ProtocolError("the server did not introduce itself")
        return self._server

    async def drain(self, grace: float = 30.0) -> None:
        """Asks the server to take nothing new, finish what it has within `grace` seconds, and end. Over ipc only.

        Returns once it has begun to. Raises InvalidRequest where it is not allowed.
        """
        await self._control(Drain(uuid.uuid4().hex, _seconds("grace", grace)))

    async def reload(self, model: str) -> str:
        """Asks the server to go on with other weights of the same shape, and waits until it does. Over ipc only.

        No request ends: each continues from the tokens that it has. Returns what the server says. Raises ConfigError
        for a model of another shape, ModelError for one that cannot be loaded; the server then goes on as it was.
        """
        return await self._control(Reload(uuid.uuid4().hex, model))

    async def _control(self, message: ControlMessage) -> str:
        self._must_be_open()
        if not isinstance(self._made, RemoteBackend):
            raise ServiceClosed("this Client was not started")
        return await self._made.control(message)

    def backend(self) -> RemoteBackend:
        """Another connection with these options, not started: to a server whether it is ready or not."""
        return RemoteBackend(
            self._endpoint,
            self._server_key,
            self._connect_timeout,
            self._lost_after,
            self._resume_timeout,
            self._keys,
        )

    async def start(self) -> None:
        self._must_be_new()
        self._made = backend = self.backend()
        await backend.start()
        info = await backend.info("server")
        if not isinstance(info, ServerInfo) or info.version != PROTOCOL_VERSION:
            raise ProtocolError(f"{self._endpoint} does not speak protocol {PROTOCOL_VERSION}: {info}")
        self._server = info
        self._vocab_size = info.vocab_size
        try:
            tokenizer = await backend.info("tokenizer")
        except ModelError:
            tokenizer = None  # this model came without one: token ids only
        if isinstance(tokenizer, TokenizerInfo):
            self._tokenizer = Tokenizer.from_info(tokenizer)
            self._eos_token_ids = tuple(tokenizer.eos_token_ids)
        self._open = True


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MAX_SECONDS:
        raise ConfigError(f"{name}={value!r}: a number of seconds above 0 and up to {_MAX_SECONDS:g} is allowed")
    return float(value)
