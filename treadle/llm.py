"""`LLM`: the embedded engine."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from treadle.errors import ConfigError
from treadle.scheduler.options import service_options
from treadle.scheduler.policies import Policy
from treadle.scheduler.policies.guard import Guard
from treadle.transport.messages import TokenizerInfo

from .backend import Backend
from .embedded import EmbeddedBackend
from .facts import Located, load_tokenizer, locate
from .frontend import Frontend
from .server_process import ServerProcess

logger = logging.getLogger("treadle")


class LLM(Frontend):
    """A model, served inside this program.

    ```
    async with LLM("smollm2-135m", tensor_parallel_size=2) as llm:
        async for output in llm.generate("The capital of France is", SamplingParams(temperature=0)):
            print(output.delta, end="", flush=True)
    ```

    model: "smollm2-135m", a directory with config.json and safetensors, a GGUF file, or "org/name" from the hub.
    A path object is always a local one.
    in_process: False puts the scheduler into a process of its own, for programs that hold the interpreter lock.
    policy: the name of a scheduling policy, or an object of your own (docs/policies.md), for this LLM alone; objects
    only with the scheduler in this process.
    options: fields of `treadle.scheduler.options.ServiceOptions`.

    The scheduler runs on a thread of its own and the engine ranks are processes of their own; no signal handler, loop
    policy or random seed of the program is touched, and nothing is left behind however the program ends.
    Raises ConfigError here; `start` (or `async with`) raises ModelError and EngineStartFailed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "smollm2-135m",
        *,
        in_process: bool = True,
        cache_dir: Path | None = None,
        policy: str | Policy | None = None,
        **options: object,
    ) -> None:
        self._model = model
        self._in_process = in_process
        self._cache_dir = cache_dir
        self._policy: Policy | None = None
        if isinstance(policy, str):
            options["policy"] = policy
        elif policy is not None:
            self._policy = _own_policy(policy, in_process)
        self._options = service_options(**options)
        self._raw_options = options
        super().__init__()

    @property
    def engine_pids(self) -> list[int]:
        """Process ids of the engine ranks that this process started."""
        return self._made.engine_pids if isinstance(self._made, EmbeddedBackend) else []

    async def start(self) -> None:
        self._must_be_new()
        if self._options.random_weights:
            logger.warning("RANDOM WEIGHTS: the answers mean nothing; this is for benchmarks only")
        located = await asyncio.to_thread(locate, self._model, self._cache_dir)
        tokenizer = asyncio.create_task(asyncio.to_thread(load_tokenizer, located.path))
        self._vocab_size = located.facts.vocab_size
        self._made = backend = self._make_backend(located)
        try:
            await backend.start()
            self._tokenizer = await tokenizer  # was read while the engines started
        except BaseException:
            tokenizer.cancel()
            raise
        self._eos_token_ids = located.facts.eos_token_ids
        self._open = True

    def _make_backend(self, located: Located) -> Backend:
        if self._in_process:
            return EmbeddedBackend(located.facts, self._options, self._tokenizer_info, self._policy)
        return ServerProcess(str(located.path), self._raw_options, self._options.start_timeout)

    def _tokenizer_info(self) -> TokenizerInfo | None:
        """For guided requests; readers of text have the tokenizer itself. Only an open LLM is asked."""
        return self._tokenizer.to_info() if self._tokenizer is not None else None


def _own_policy(policy: Policy, in_process: bool) -> Policy:
    """The same. Raises ConfigError for what is no policy, and where the scheduler could not reach it."""
    Guard(policy)
    if not in_process:
        raise ConfigError(f"policy={policy.name!r}: an object works only with in_process=True; give a name, or that")
    return policy
