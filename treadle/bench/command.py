"""`treadle bench serve`, from the command line."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import msgspec

from treadle.client import Client
from treadle.errors import ConfigError, ServerLost
from treadle.scheduler.simulation.workload import Workload, read_lengths, read_trace
from treadle.transport.endpoints import default_endpoint

from .drive import Driver, Record
from .plan import Plan, Rate, drawn, generator, prompt_plan, random_lengths, token_plan, word_plan
from .plot import check_plot, write_plot
from .progress import Progress
from .report import Goals, build_report, details, table
from .target import Target, ZmqTarget

_HTTP_VOCABULARY = 1000
KEY_VARIABLE = "OPENAI_API_KEY"


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("who is asked (one of the first two)")
    who.add_argument("--base-url", metavar="URL", help="an OpenAI endpoint, http://127.0.0.1:8000 for example")
    who.add_argument("--endpoint", help="a server of ours: ipc:///absolute/path, tcp://host:port, or `default`")
    who.add_argument("--server-key", metavar="KEY", help="the server's public CURVE key, for tcp")
    who.add_argument("--model", default="", help="over HTTP (default: the first that the endpoint names)")
    who.add_argument("--chat", action="store_true", help="over HTTP: /v1/chat/completions, with prompts of words")
    who.add_argument("--api-key", metavar="KEY", help=f"over HTTP (default: the environment's {KEY_VARIABLE})")
    who.add_argument("--extra-body", metavar="JSON", help="over HTTP: an object, put into the body of every request")
    when = parser.add_argument_group("when")
    when.add_argument(
        "--request-rate", type=float, default=inf, metavar="FLOAT", help="requests per second; inf: at once (default)"
    )
    when.add_argument("--burstiness", type=float, default=1.0, metavar="FLOAT", help=_BURSTINESS)
    when.add_argument(
        "--max-concurrency", type=int, default=0, metavar="INT", help="open at once; 0: no bound (default)"
    )
    when.add_argument("--trace", type=Path, metavar="FILE", help="arrivals and lengths: see docs/simulator.md")
    what = parser.add_argument_group("what")
    what.add_argument("--num-prompts", type=int, metavar="INT", help="requests (default 1000; of a trace: all)")
    what.add_argument("--dataset", type=Path, metavar="FILE", help="JSON lines [input, output]: lengths in tokens")
    what.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines {"prompt": …, "output_tokens": …}')
    what.add_argument("--input-len", type=int, default=256, metavar="INT", help="tokens (default %(default)s)")
    what.add_argument("--output-len", type=int, default=128, metavar="INT", help="tokens (default %(default)s)")
    what.add_argument("--range-ratio", type=float, default=0.0, metavar="FLOAT", help=_RANGE)
    what.add_argument("--words", action="store_true", help="prompts of words instead of token ids")
    what.add_argument("--vocab-size", type=int, metavar="INT", help=_VOCABULARY)
    what.add_argument("--seed", type=int, default=0, metavar="INT", help="of everything drawn (default %(default)s)")
    what.add_argument("--temperature", type=float, default=0.0, metavar="FLOAT", help="(default %(default)g)")
    what.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="every answer is as long as was asked for (default: on)",
    )
    what.add_argument("--warmup", type=int, default=1, metavar="INT", help="requests before, not counted (default 1)")
    what.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS", help="of a request (default 3600)")
    told = parser.add_argument_group("what is told")
    told.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help="service levels: ttft, tpot, e2el")
    told.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures, and those of each request")
    told.add_argument("--plot", type=Path, metavar="FILE", help="where to draw a picture, .svg; needs treadle[plots]")
    parser.set_defaults(run=run_bench)


_BURSTINESS = "shape of the gaps' gamma distribution: 1 is Poisson (default), less is burstier"
_RANGE = "lengths are uniform within this share of the two (default 0: exact)"
_VOCABULARY = f"token ids are drawn below it (default: the server's, {_HTTP_VOCABULARY} over HTTP)"


def run_bench(options: argparse.Namespace) -> int:
    """Exit code 0; 1 when every request failed."""
    goals = Goals.of(options.goodput)
    if options.plot is not None:
        check_plot(options.plot)
    _check(options)
    records = asyncio.run(_measure(options))
    report = build_report(records, goals)
    print(table(report))
    if options.json is not None:
        _write(options.json, {**_asked(options), **report, "each": details(records)})
    if options.plot is not None:
        write_plot(options.plot, records, goals.limits)
    return 0 if report["completed"] else 1


def _check(options: argparse.Namespace) -> None:
    """What can be judged before anybody is asked. Raises ConfigError."""
    if (options.base_url is None) == (options.endpoint is None):
        raise ConfigError("say who is asked with one of --base-url, --endpoint")
    if options.base_url is not None and find_spec("aiohttp") is None:
        raise ConfigError("--base-url needs aiohttp: pip install 'treadle[bench]'")
    if options.base_url is None:
        given = [name for name in ("model", "chat", "api_key", "extra_body") if vars(options)[name]]
        if given:
            raise ConfigError(f"{', '.join('--' + name.replace('_', '-') for name in given)}: with --base-url only")
    if sum(options.__dict__[name] is not None for name in ("trace", "dataset", "prompts")) > 1:
        raise ConfigError(
            "--trace, --dataset and --prompts: give one of them, or none for --input-len and --output-len"
        )
    for name, low in (("max_concurrency", 0), ("num_prompts", 1), ("warmup", 0), ("output_len", 1)):
        value = vars(options)[name]
        if value is not None and value < low:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: a number from {low} is allowed")
    if not 0 < options.timeout <= 1e6:
        raise ConfigError(f"--timeout {options.timeout:g}: seconds above 0, up to 1e6, are allowed")


async def _measure(options: argparse.Namespace) -> list[Record]:
    async with _target(options) as (target, vocab_size):
        plan = _plan(options, vocab_size)
        first = plan.asks[0]
        for _ in range(options.warmup):
            [record] = await Driver(target, time.perf_counter, patience=options.timeout).run(
                Plan([replace(first, arrival=0.0, timeout=None)], timed=False)
            )
            if record.error:
                raise ServerLost(f"the first request failed: {record.error}: {record.message}")
        progress = Progress(sys.stderr, len(plan.asks))
        driver = Driver(target, time.perf_counter, options.max_concurrency, options.timeout, progress.seen)
        return await driver.run(plan)


def _plan(options: argparse.Namespace, vocab_size: int) -> Plan:
    rate = Rate(per_second=options.request_rate, burstiness=options.burstiness)
    random = generator(options.seed)
    count = options.num_prompts or 1000
    if options.prompts is not None:
        return prompt_plan(options.prompts, options.output_len, count, rate, random)
    workload = _workload(options, count, rate)
    timed = options.trace is not None or rate.per_second != inf
    if options.words or options.chat:
        return word_plan(workload, timed, options.seed)
    return token_plan(workload, timed, options.vocab_size or vocab_size, options.seed)


def _workload(options: argparse.Namespace, count: int, rate: Rate) -> Workload:
    random = generator(options.seed)
    if options.trace is not None:
        whole = read_trace(options.trace)
        return whole.take(whole.number[: options.num_prompts].astype("intp"))
    if options.dataset is not None:
        return drawn(read_lengths(options.dataset), count, rate, random)
    lengths = random_lengths(count, options.input_len, options.output_len, options.range_ratio, random)
    return drawn(lengths, count, rate, random)


@asynccontextmanager
async def _target(options: argparse.Namespace) -> AsyncIterator[tuple[Target, int]]:
    """Open, with the size of its vocabulary."""
    if options.base_url is None:
        endpoint = default_endpoint() if options.endpoint == "default" else options.endpoint
        async with Client(endpoint, server_key=options.server_key) as client:
            yield ZmqTarget(client, options.temperature, options.ignore_eos), client.server.vocab_size
        return
    from .openai_target import OpenAITarget

    extra: dict[str, Any] = {"temperature": options.temperature} | ({"ignore_eos": True} if options.ignore_eos else {})
    key = os.environ.get(KEY_VARIABLE, "") if options.api_key is None else options.api_key
    async with OpenAITarget(
        options.base_url,
        model=options.model,
        key=key,
        chat=options.chat,
        extra=extra | _object(options.extra_body),
    ) as target:
        yield target, _HTTP_VOCABULARY


def _object(text: str | None) -> dict[str, Any]:
    try:
        return {} if text is None else msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"--extra-body: {error}") from error


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures are of. No keys."""
    names = ("base_url", "endpoint", "model", "burstiness", "max_concurrency", "num_prompts", "seed", "temperature")
    asked = {name: vars(options)[name] for name in (*names, "chat", "ignore_eos")}
    asked["request_rate"] = "inf" if options.request_rate == inf else options.request_rate
    return asked | {n: str(vars(options)[n]) for n in ("trace", "dataset", "prompts") if vars(options)[n] is not None}


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
