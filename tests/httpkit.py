"""For tests of the gateway: clients, a model that says what it is told to, and a look at what is left."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import openai

from treadle.errors import TreadleError
from treadle.frontend import Frontend
from treadle.scheduler.delivery import refusal
from treadle.stream import Stream
from treadle.tokenizer import Tokenizer
from treadle.transport.codec import unpack
from treadle.transport.messages import (
    Abort,
    Delta,
    Health,
    InfoRequest,
    ServerInfo,
    ServiceMessage,
    ServiceMetrics,
    Stats,
    Submit,
)

KEY = "sk-none"


def client(url: str, key: str = KEY) -> openai.OpenAI:
    """Without retries: what a test asks for is asked for once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def async_client(url: str, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def metrics(url: str) -> dict[str, float]:
    """Every sample of /metrics, by name and labels as they are printed."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return {name: float(value) for name, value in re.findall(r"^([^#\s].*) (\S+)$", text, re.MULTILINE)}


class Scripted(Frontend):
    """Writes `script`, a few tokens at a time, or fails with `error`; `prompts` keeps what it was asked."""

    def __init__(self, directory: Path, template: str = "") -> None:
        super().__init__()
        plain = Tokenizer.load(directory)
        info = plain.to_info()
        info = type(info)(**{**{f: getattr(info, f) for f in info.__struct_fields__}, "chat_template": template})
        self._tokenizer = Tokenizer.from_info(info) if template else plain
        self.script = ""
        self.error: TreadleError | None = None
        self.error_after = 0
        self.prompts: list[str] = []
        self.submits: list[Submit] = []
        self.state = "ready"

    async def start(self) -> None:
        self._made = _Backend(self)
        self._open = True


class _Backend:
    def __init__(self, model: Scripted) -> None:
        self._model = model
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, message: Submit, stream: Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._write(message, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write(self, message: Submit, stream: Stream) -> None:
        model = self._model
        model.submits.append(message)
        model.prompts.append(model.detokenize(unpack(message.tokens).tolist(), skip_special_tokens=False))
        if model.error is not None and not model.error_after:
            stream.refuse(refusal(message.id, model.error))
            return
        tokens = model.tokenize(model.script, add_special_tokens=False)
        for place in range(0, len(tokens), 3):
            await asyncio.sleep(0)
            if model.error is not None and place >= model.error_after:
                stream.fail(model.error)
                return
            for index in range(message.params.n):
                stream.feed(Delta(message.id, index, tokens[place : place + 3]))
        for index in range(message.params.n):
            stream.feed(Delta(message.id, index, [], finish="stop", stop_token=257))

    def abort(self, message: Abort) -> None:
        pass

    async def info(self, kind: str) -> ServiceMessage:
        answers: Mapping[str, Any] = {
            "server": ServerInfo(
                id="", version=1, incarnation="x", model="scripted", max_model_len=512, vocab_size=320, world_size=1
            ),
            "stats": Stats(),
            "metrics": ServiceMetrics(),
            "health": Health(state=self._model.state, detail="as told"),
        }
        answer: ServiceMessage = answers[InfoRequest("", kind).kind]
        return answer

    async def start(self) -> None: ...

    async def close(self) -> None: ...
