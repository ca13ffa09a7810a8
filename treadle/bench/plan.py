"""What is to be asked, and when: made before the first request goes out, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.errors import ConfigError
from treadle.scheduler.simulation.workload import Workload, make_workload

_FIRST_TOKEN = 3
"""Lower ids are those of special tokens in most vocabularies."""
_WORDS = "time year people way day man thing woman life child world school state family hand part place"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. arrival: seconds from the beginning. prompt: token ids, or a text. output: tokens.

    tenant, priority: as the endpoint understands them. timeout: seconds until nobody waits for it, None is for ever.
    """

    arrival: float
    prompt: list[int] | str
    output: int
    tenant: str = ""
    priority: int = 0
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests in the order of their arrival.

    timed: whether they are due at times of their own. Without, all are due at once, or, where only so many may be open,
    each when its turn comes: then nothing arrives on its own account, and latency begins when the request is sent.
    """

    asks: Sequence[Ask]
    timed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Arrivals at random. per_second: inf is all at once. burstiness: the shape of gamma distributed gaps, as in
    vLLM's benchmark: 1 is a Poisson process, less is burstier, more is more regular."""

    per_second: float = inf
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if not self.per_second > 0:
            raise ConfigError(f"request rate {self.per_second!r}: requests per second above 0, or inf, are allowed")
        if not (isfinite(self.burstiness) and self.burstiness > 0):
            raise ConfigError(f"burstiness {self.burstiness!r}: a number above 0 is allowed")

    def arrivals(self, count: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
        """Seconds, ascending."""
        if self.per_second == inf:
            return np.zeros(count)
        return np.cumsum(random.gamma(self.burstiness, 1 / (self.per_second * self.burstiness), count))


def generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise ConfigError(f"seed {seed}: a number from 0 is allowed")
    return np.random.Generator(np.random.PCG64(seed))


def drawn(lengths: Sequence[tuple[int, int]], count: int, rate: Rate, random: np.random.Generator) -> Workload:
    """`count` requests of these lengths. Each length comes once before any comes twice."""
    rounds = -(-count // len(lengths))
    chosen = np.concatenate([random.permutation(len(lengths)) for _ in range(rounds)])[:count]
    pairs = np.array(lengths, np.int32)[chosen]
    return make_workload(rate.arrivals(count, random), pairs[:, 0], pairs[:, 1])


def random_lengths(
    count: int, inputs: int, outputs: int, spread: float, random: np.random.Generator
) -> list[tuple[int, int]]:
    """Uniform within `spread` of the two means: 0 is exactly these, 0.5 is from half to half as much again."""
    if min(inputs, outputs) < 1 or not 0 <= spread < 1:
        raise ConfigError(
            f"lengths {inputs} and {outputs}, spread {spread}: tokens from 1, and 0 <= spread < 1, are allowed"
        )
    columns = []
    for mean in (inputs, outputs):
        low, high = max(1, round(mean * (1 - spread))), max(1, round(mean * (1 + spread)))
        columns.append(random.integers(low, high + 1, count).tolist())
    return list(zip(*columns, strict=True))


def token_plan(workload: Workload, timed: bool, vocab_size: int, seed: int) -> Plan:
    """Prompts of random token ids below `vocab_size`; requests that share a prefix share its tokens."""
    if vocab_size <= _FIRST_TOKEN:
        raise ConfigError(f"vocabulary of {vocab_size} tokens: more than {_FIRST_TOKEN} are needed")

    def tokens(*name: int, count: int) -> list[int]:
        found: list[int] = _generator_of(seed, *name).integers(_FIRST_TOKEN, vocab_size, count).tolist()
        return found

    asks = []
    for i in range(len(workload)):
        shared = int(workload.prefix_tokens[i])
        head = tokens(0, int(workload.prefix[i]), count=shared) if shared else []
        asks.append(_ask(workload, i, head + tokens(1, i, count=int(workload.inputs[i]) - shared)))
    return Plan(asks, timed)


def word_plan(workload: Workload, timed: bool, seed: int) -> Plan:
    """Prompts of common words, for endpoints that take no token ids; in most vocabularies each is one token."""
    words = _WORDS.split()

    def text(*name: int, count: int) -> list[str]:
        return [words[i] for i in _generator_of(seed, *name).integers(0, len(words), count)]

    asks = []
    for i in range(len(workload)):
        shared = int(workload.prefix_tokens[i])
        head = text(0, int(workload.prefix[i]), count=shared) if shared else []
        asks.append(_ask(workload, i, " ".join(head + text(1, i, count=int(workload.inputs[i]) - shared))))
    return Plan(asks, timed)


def _generator_of(seed: int, *name: int) -> np.random.Generator:
    """One for each part of each prompt: a request's tokens do not hang on how many there are beside it."""
    return np.random.Generator(np.random.PCG64([seed, *name]))


def _ask(workload: Workload, i: int, prompt: list[int] | str) -> Ask:
    timeout = float(workload.timeout[i])
    return Ask(
        arrival=float(workload.arrival[i]),
        prompt=prompt,
        output=int(workload.outputs[i]),
        tenant=workload.tenants[int(workload.tenant[i])],
        priority=int(workload.priority[i]),
        timeout=timeout or None,
    )


class PromptLine(msgspec.Struct, frozen=True):
    """A line of a file of prompts, as vLLM's custom data sets have them; other fields are left out."""

    prompt: str
    output_tokens: int | None = None


def prompt_plan(path: Path, output: int, count: int, rate: Rate, random: np.random.Generator) -> Plan:
    """From JSON lines `{"prompt": …}`. output: tokens where the line does not say. Raises ConfigError with the line."""
    decoder = msgspec.json.Decoder(PromptLine)
    try:
        texts = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    lines = []
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if not line.prompt or (line.output_tokens is not None and line.output_tokens < 1):
            raise ConfigError(f"{path}, line {number}: a prompt that is not empty and output_tokens from 1 are allowed")
        lines.append(line)
    if not lines:
        raise ConfigError(f"{path} is empty")
    arrivals = rate.arrivals(count, random).tolist()
    asks = [
        Ask(at, line.prompt, output if line.output_tokens is None else line.output_tokens)
        for at, line in zip(arrivals, (lines[i % len(lines)] for i in range(count)), strict=True)
    ]
    return Plan(asks, rate.per_second != inf)
