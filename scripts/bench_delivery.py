#!/usr/bin/env python
"""What it costs the scheduler's thread to hand 1,024 tokens of a step to their readers.

    bench_delivery.py embedded|clients [--streams 1024] [--clients 64] [--steps 300] [--json]

Everything is real: the service on its thread, an engine process with a model of one tiny layer and random weights, and
readers that `async for` their streams, in this process ("embedded") or over ZeroMQ ("clients": the service is in a
process of its own, and the readers share this one). Timed is the delivery of every step that brought each stream a
token, in CPU time of the scheduler's thread, so that waiting for readers or for the interpreter's lock does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from treadle import LLM, Client, SamplingParams
from treadle.frontend import Frontend
from treadle.scheduler.options import service_options
from treadle.scheduler.outbox import Outbox
from treadle.scheduler.request import Outputs
from treadle.serve import ServeSettings, run

PROMPT = list(range(1, 9))
BLOCK = 16
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


class Watch:
    """Nanoseconds of CPU time of each delivery to `streams` streams, and of the whole thread from step to step."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self.delivery: list[int] = []
        self.ends: list[int] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Every service made meanwhile is watched."""
        deliver = Outbox.deliver_step

        def timed(outbox: Outbox, outputs: Outputs) -> None:
            began = time.thread_time_ns()
            deliver(outbox, outputs)
            ended = time.thread_time_ns()
            if len(outputs.sequences) == self._streams:
                self.delivery.append(ended - began)
                self.ends.append(ended)

        Outbox.deliver_step = timed  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            Outbox.deliver_step = deliver  # type: ignore[method-assign]

    def report(self) -> dict[str, float]:
        """Microseconds. The first tenth is warm-up."""
        times = self.delivery[len(self.delivery) // 10 :]
        ends = self.ends[len(self.ends) // 10 :]
        ordered = sorted(times)
        return {
            "steps": len(times),
            "delivery": statistics.median(times) / 1e3,
            "delivery_p99": ordered[int(0.99 * len(ordered))] / 1e3,
            "thread_per_step": (ends[-1] - ends[0]) / (len(ends) - 1) / 1e3,
        }


def options(streams: int, steps: int) -> dict[str, object]:
    return {
        "random_weights": True,
        "max_num_seqs": streams,
        "max_num_batched_tokens": streams * (len(PROMPT) + 1),
        "num_blocks": 1 + streams * (2 + (len(PROMPT) + steps) // BLOCK),
        "block_size": BLOCK,
    }


async def read_all(frontends: list[Frontend], streams: int, steps: int) -> None:
    """Reads `streams` requests of `steps` tokens to their ends, spread evenly."""
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)

    async def read(frontend: Frontend) -> None:
        tokens = 0
        async for output in frontend.generate(PROMPT, params):
            tokens += len(output.outputs[0].delta_token_ids)
        if tokens != steps:
            raise RuntimeError(f"{tokens} tokens came, not {steps}")

    await asyncio.gather(*(read(frontends[index % len(frontends)]) for index in range(streams)))


def embedded(streams: int, steps: int) -> dict[str, float]:
    watch = Watch(streams)

    async def main(model: str) -> None:
        async with LLM(model, **options(streams, steps)) as llm:
            await read_all([llm], streams, steps)

    with tempfile.TemporaryDirectory() as directory, watch.installed():
        asyncio.run(main(write_model(directory)))
    return watch.report()


def clients(count: int, streams: int, steps: int) -> dict[str, float]:
    """The service runs in a child; this process holds `count` clients."""

    async def main(endpoint: str) -> None:
        frontends: list[Frontend] = [Client(endpoint) for _ in range(count)]
        try:
            for frontend in frontends:
                await frontend.start()
            await read_all(frontends, streams, steps)
        finally:
            for frontend in frontends:
                await frontend.close()

    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        endpoint = f"ipc://{directory}/service.ipc"
        command = [sys.executable, __file__, "serve", "--directory", directory]
        command += ["--streams", str(streams), "--steps", str(steps)]
        server = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(server.kill)
        if server.stdout is None or server.stdout.readline() != "ready\n":
            raise RuntimeError("the server did not start")
        asyncio.run(main(endpoint))
        server.send_signal(signal.SIGTERM)
        report: dict[str, float] = json.loads(server.stdout.read())
        return report


def serve(directory: str, streams: int, steps: int) -> dict[str, float]:
    """A server until SIGTERM; what it measured."""
    watch = Watch(streams)
    settings = ServeSettings(
        write_model(directory), f"ipc://{directory}/service.ipc", service_options(**options(streams, steps))
    )
    with watch.installed():
        run(settings, lambda endpoint: print("ready", flush=True))
    return watch.report()


def write_model(directory: str) -> str:
    Path(directory).chmod(0o700)
    (Path(directory) / "config.json").write_text(json.dumps(MODEL))
    return directory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["embedded", "clients", "serve"], help="serve: what `clients` starts by itself")
    parser.add_argument("--streams", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="tokens of each stream")
    parser.add_argument("--directory", default="", help="of `serve`")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    if asked.mode == "embedded":
        report = embedded(asked.streams, asked.steps)
    elif asked.mode == "clients":
        report = clients(asked.clients, asked.streams, asked.steps)
    else:
        report = serve(asked.directory, asked.streams, asked.steps)
    if asked.json or asked.mode == "serve":
        print(json.dumps(report))
    else:
        print(f"{asked.mode}: {report['delivery']:.0f} µs of the scheduler's thread, p99 {report['delivery_p99']:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
