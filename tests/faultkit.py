"""A real service over real rank processes that have no model and misbehave to order (`rogue_engine`)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from treadle.scheduler.config import CoreConfig
from treadle.scheduler.delivery import Sink
from treadle.scheduler.fake_engine import expected_output
from treadle.scheduler.lifecycle import ServiceEvent
from treadle.scheduler.options import ModelFacts, service_options
from treadle.scheduler.service import Service
from treadle.transport.codec import pack
from treadle.transport.messages import Delta, SamplingParams, Submit

VOCAB = 500
FACTS = ModelFacts(name="none", path="/none", vocab_size=VOCAB, context=512, max_ranks=8, eos_token_ids=())
PROMPTS = [[1, 2, 3], list(range(40)), [7], [9] * 12]


def params(i: int, tokens: int = 40) -> SamplingParams:
    return SamplingParams(seed=i, max_tokens=tokens)


def undisturbed(prompt: list[int], params: SamplingParams) -> list[int]:
    return expected_output(prompt, params, CoreConfig(num_blocks=400, vocab_size=VOCAB, max_model_len=512)).tokens


class Collector(Sink):
    """Keeps what it gets, and says when a request has ended."""

    def __init__(self, name: str = "test") -> None:
        super().__init__(name)
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, Delta] = {}
        self.ends: list[str] = []
        self._news = asyncio.Event()

    def flush(self) -> None:
        for delta in self.take().each():
            self.tokens.setdefault(delta.id, []).extend(delta.tokens)
            self.last[delta.id] = delta
            if delta.finish:
                self.ends.append(delta.id)
        self._news.set()

    async def ended(self, *ids: str) -> None:
        async with asyncio.timeout(30):
            while not set(ids) <= set(self.ends):
                self._news.clear()
                await self._news.wait()

    async def begun(self, request_id: str, tokens: int = 1) -> None:
        async with asyncio.timeout(30):
            while len(self.tokens.get(request_id, [])) < tokens:
                self._news.clear()
                await self._news.wait()


class Faulty:
    """A service, its events, and one sink for all requests."""

    def __init__(self, directory: Path, faults: Sequence[str], pace: float, options: dict[str, object]) -> None:
        self.events: list[ServiceEvent] = []
        self.sink = Collector()
        script = directory / "faults"
        script.write_text("\n".join(faults))
        command = [sys.executable, "-m", "tests.rogue_engine", "--vocab", str(VOCAB), "--faults", str(script)]
        values: dict[str, object] = {"num_blocks": 400, "tensor_parallel_size": 2, "debug": True, "step_timeout": 2.0}
        self.service = Service(
            FACTS,
            service_options(**(values | options)),
            lambda: None,
            on_event=self.events.append,
            engine_command=[*command, "--pace", str(pace)],
        )

    def submit(self, request_id: str, prompt: list[int], params: SamplingParams, **more: Any) -> None:
        """more: fields of `Submit`."""
        self.service.submit(Submit(id=request_id, tokens=pack(prompt), params=params, **more), self.sink)

    def submit_all(self) -> None:
        for i, prompt in enumerate(PROMPTS):
            self.submit(str(i), prompt, params(i))

    async def all_ended(self) -> None:
        await self.sink.ended(*(str(i) for i in range(len(PROMPTS))))

    def exact(self, *, but: Sequence[str] = ()) -> bool:
        """Every request but those gave exactly the tokens of an undisturbed run."""
        return all(
            self.sink.tokens[str(i)] == undisturbed(prompt, params(i))
            for i, prompt in enumerate(PROMPTS)
            if str(i) not in but
        )


@asynccontextmanager
async def faulty(directory: Path, *faults: str, pace: float = 0.0, **options: object) -> AsyncIterator[Faulty]:
    """faults: lines for `rogue_engine`."""
    made = Faulty(directory, faults, pace, options)
    try:
        await made.service.start()
        yield made
    finally:
        await made.service.close()
