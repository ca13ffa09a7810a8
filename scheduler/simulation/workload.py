"""What comes: arrivals, lengths, tenants, shared prefixes; as columns, for an hour of a fleet is millions of them."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from treadle.errors import ConfigError
from treadle.scheduler.admission import MAX_PRIORITY

from .sizes import MOST_PREFIXES, MOST_REQUESTS, MOST_SECONDS, MOST_TOKENS, check_most

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
_MOST_CV = 1_000
_INT32 = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in the order of their arrival; one entry of each column is one request.

    arrival: seconds from the beginning. inputs, outputs: tokens; outputs are exact, no request ends by itself earlier.
    tenant: index into `tenants`. prefix: requests with the same number share their first `prefix_tokens` tokens, -1 is
    none. priority: lower goes first. timeout: seconds, 0 is none. number: names a request in the whole workload, and
    its made-up tokens with it. prompts: the real tokens (int32 bytes), where there are any.
    """

    arrival: Floats
    inputs: Ints
    outputs: Ints
    tenant: Ints
    prefix: Ints
    prefix_tokens: Ints
    priority: Ints
    timeout: Floats
    number: Ints
    tenants: tuple[str, ...] = ("",)
    prompts: tuple[bytes, ...] | None = None

    def __len__(self) -> int:
        return len(self.arrival)

    def take(self, chosen: npt.NDArray[np.intp]) -> Workload:
        """Only these requests, by index, in that order."""
        columns: dict[str, Any] = {name: column[chosen] for name, column in self.columns().items()}
        prompts = None if self.prompts is None else tuple(self.prompts[i] for i in chosen.tolist())
        return replace(self, **columns, prompts=prompts)

    def columns(self) -> dict[str, npt.NDArray[np.float64] | npt.NDArray[np.int32]]:
        return {
            "arrival": self.arrival,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "tenant": self.tenant,
            "prefix": self.prefix,
            "prefix_tokens": self.prefix_tokens,
            "priority": self.priority,
            "timeout": self.timeout,
            "number": self.number,
        }


def make_workload(
    arrival: npt.ArrayLike,
    inputs: npt.ArrayLike,
    outputs: npt.ArrayLike,
    *,
    tenant: npt.ArrayLike = 0,
    tenants: Sequence[str] = ("",),
    prefix: npt.ArrayLike = -1,
    prefix_tokens: npt.ArrayLike = 0,
    priority: npt.ArrayLike = 0,
    timeout: npt.ArrayLike = 0.0,
    prompts: Sequence[bytes] | None = None,
) -> Workload:
    """Checks, fills in and sorts by arrival. Raises ConfigError for what cannot be."""
    at = np.asarray(arrival, np.float64)
    order = np.argsort(at, kind="stable")

    def integers(values: npt.ArrayLike) -> Ints:
        raw = np.asarray(values)
        if raw.size and not -_INT32 - 1 <= raw.min() <= raw.max() <= _INT32:  # numpy wraps int64 without a word
            raise ConfigError("tokens, priorities, tenants and prefixes must be numbers of 32 bits")
        return np.broadcast_to(raw.astype(np.int32), at.shape)[order]

    made = Workload(
        arrival=at[order],
        inputs=integers(inputs),
        outputs=integers(outputs),
        tenant=integers(tenant),
        prefix=integers(prefix),
        prefix_tokens=integers(prefix_tokens),
        priority=integers(priority),
        timeout=np.broadcast_to(np.asarray(timeout, np.float64), at.shape)[order],
        number=np.arange(at.size, dtype=np.int32),
        tenants=tuple(tenants),
        prompts=None if prompts is None else tuple(prompts[i] for i in order.tolist()),
    )
    if not at.size:
        raise ConfigError("the workload has no requests")
    if not (at.min() >= 0 and at.max() <= MOST_SECONDS):  # neither is so for NaN
        raise ConfigError(f"arrivals must be seconds from 0 to {MOST_SECONDS:,}")
    if made.inputs.min() < 1 or made.outputs.min() < 1:
        raise ConfigError("input and output must have at least one token each")
    if (made.prefix_tokens > made.inputs).any() or made.prefix_tokens.min() < 0:
        raise ConfigError("prefix_tokens must be from 0 to the tokens of the input")
    return made


# ── a trace file ──


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a trace. arrival: seconds. input, output: tokens. prefix: a name; see `Workload`.

    prefix_tokens: how many tokens are shared under that name; not given: all but one of the input.
    """

    arrival: float
    input: int
    output: int
    tenant: str = ""
    prefix: str = ""
    prefix_tokens: int | None = None
    priority: int = 0
    timeout: float = 0.0


def read_trace(path: Path) -> Workload:
    """From JSON lines. Raises ConfigError that names the line."""
    decoder = msgspec.json.Decoder(TraceLine)
    lines: list[TraceLine] = []
    for number, text in _lines(path):
        try:
            line = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        _check_line(line, f"{path}, line {number}")
        lines.append(line)
    if not lines:
        raise ConfigError(f"{path} has no requests")
    tenants = {name: i for i, name in enumerate(dict.fromkeys(line.tenant for line in lines))}
    prefixes = {name: i for i, name in enumerate(dict.fromkeys(line.prefix for line in lines if line.prefix))}
    return make_workload(
        [line.arrival for line in lines],
        [line.input for line in lines],
        [line.output for line in lines],
        tenant=[tenants[line.tenant] for line in lines],
        tenants=tuple(tenants),
        prefix=[prefixes.get(line.prefix, -1) for line in lines],
        prefix_tokens=[_shared(line) for line in lines],
        priority=[line.priority for line in lines],
        timeout=[line.timeout for line in lines],
    )


def _check_line(line: TraceLine, where: str) -> None:
    if not (0 <= line.arrival <= MOST_SECONDS and 0 <= line.timeout <= MOST_SECONDS):
        raise ConfigError(f"{where}: arrival and timeout from 0 to {MOST_SECONDS:,} seconds are allowed")
    _check_lengths((line.input, line.output), where)
    if abs(line.priority) > MAX_PRIORITY:
        raise ConfigError(f"{where}: priority={line.priority}: it must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    if line.prefix_tokens and not line.prefix:
        raise ConfigError(f"{where}: prefix_tokens without a prefix: name whom the tokens are shared with")
    if not 0 <= _shared(line) <= line.input:
        raise ConfigError(
            f"{where}: prefix_tokens={line.prefix_tokens}: it must be from 0 to the {line.input} tokens of the input"
        )


def _check_lengths(pair: tuple[int, int], where: str) -> None:
    """Of input and output."""
    if min(pair) < 1 or max(pair) > MOST_TOKENS:
        raise ConfigError(f"{where}: input and output from 1 to {MOST_TOKENS} tokens are allowed")


def _shared(line: TraceLine) -> int:
    if not line.prefix:
        return 0
    return line.input - 1 if line.prefix_tokens is None else line.prefix_tokens


# ── lengths and a random process ──


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """Arrivals at random. rate: requests per second. cv: coefficient of variation of the gaps between them.

    cv 1 is a Poisson process; more is bursty (gamma distributed gaps), 0 is regular. seconds, requests: which comes
    first ends it, 0 is no end. prefixes: groups of requests that share `prefix_tokens` tokens before their own input.
    """

    rate: float
    cv: float = 1.0
    seconds: float = 0.0
    requests: int = 0
    seed: int = 0
    prefixes: int = 0
    prefix_tokens: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"rate={self.rate!r}: requests per second, more than 0")
        for name, value in (("cv", self.cv), ("seconds", self.seconds)):
            if not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value!r}: a number from 0 is allowed")
        whole = {"requests": self.requests, "seed": self.seed, "prefixes": self.prefixes}
        for name, value in (whole | {"prefix_tokens": self.prefix_tokens}).items():
            if value < 0:
                raise ConfigError(f"{name}={value}: a whole number from 0 is allowed")
        if not (self.seconds or self.requests):
            raise ConfigError("give the number of requests, the seconds, or both: without them there is no end")
        if self.cv > _MOST_CV:
            raise ConfigError(f"cv={self.cv!r}: at most {_MOST_CV} is allowed")
        check_most("seconds", self.seconds, MOST_SECONDS)
        check_most("prefixes", self.prefixes, MOST_PREFIXES)
        check_most("prefix_tokens", self.prefix_tokens, MOST_TOKENS)
        if bool(self.prefixes) != bool(self.prefix_tokens):
            raise ConfigError("prefixes and prefix_tokens: give both, how many there are and how long each is")
        check_most("requests", self.requests, MOST_REQUESTS)
        if not self.requests:
            check_most("rate times seconds", self.rate * self.seconds, MOST_REQUESTS)


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """JSON lines `[input, output]`. Raises ConfigError that names the line."""
    decoder = msgspec.json.Decoder(tuple[int, int])
    found = []
    for number, text in _lines(path):
        try:
            pair = decoder.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        _check_lengths(pair, f"{path}, line {number}")
        found.append(pair)
    if not found:
        raise ConfigError(f"{path} is empty")
    return found


def draw_workload(lengths: Sequence[tuple[int, int]], process: Process) -> Workload:
    """Requests of these lengths, drawn with replacement, at the arrivals of the process; the same for the same seed."""
    random = np.random.Generator(np.random.PCG64(process.seed))
    arrival = _arrivals(random, process)
    if not arrival.size:
        raise ConfigError(f"no request arrives within {process.seconds:g} s at {process.rate:g} per second")
    pairs = np.array(lengths, np.int32)[random.integers(0, len(lengths), arrival.size)]
    shared = process.prefix_tokens if process.prefixes else 0
    prefix = random.integers(0, process.prefixes, arrival.size) if process.prefixes else -1
    return make_workload(arrival, pairs[:, 0] + shared, pairs[:, 1], prefix=prefix, prefix_tokens=shared)


def _arrivals(random: np.random.Generator, process: Process) -> Floats:
    expected = process.seconds * process.rate
    count = process.requests or int(expected + 6 * (1 + process.cv) * (expected**0.5) + 10)
    mean = 1 / process.rate
    gaps = random.gamma(process.cv**-2, mean * process.cv**2, count) if process.cv else np.full(count, mean)
    arrival = np.cumsum(gaps)
    return arrival[arrival < process.seconds] if process.seconds else arrival


def _lines(path: Path) -> Iterable[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Some editors mark a file as UTF-8 by its first bytes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return ((number, line) for number, line in enumerate(data.removeprefix(BOM_UTF8).splitlines(), 1) if line.strip())
