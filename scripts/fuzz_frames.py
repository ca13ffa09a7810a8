"""Mutated frames against every decoder and against the socket that clients connect to.

    python scripts/fuzz_frames.py --frames 1000000 --socket-frames 200000 --json fuzz.json

Frames begin as valid messages of every kind; bits, bytes and lengths are changed, parts are cut, repeated and put
together anew, and msgpack values are exchanged for others. A decoder may give a message of its union or raise
ProtocolError. What decodes as a request goes on to the checks and into a scheduler core, which may accept it or raise a
typed error, and whose invariants must hold. The socket part does the same to a service over ranks without a model, and
then asks whether it still gives the right tokens, has lost no block, and has not grown. The same seed gives the same
frames.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import zmq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.faultkit import faulty
from treadle.errors import ProtocolError, TreadleError
from treadle.scheduler.client_limits import ClientLimits
from treadle.scheduler.client_server import ClientServer
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.core import Core
from treadle.transport.codec import Codec, client_codec, engine_codec, pack, rank_codec, service_codec
from treadle.transport.messages import (
    Abort,
    Configure,
    Delta,
    Deltas,
    Done,
    Drain,
    Failure,
    Health,
    Hello,
    InfoRequest,
    Ping,
    Pong,
    Ready,
    Refused,
    Reload,
    RowFault,
    RowStart,
    SamplingParams,
    ServerInfo,
    ServiceMetrics,
    Shutdown,
    Stats,
    StepPlan,
    StepResult,
    Submit,
    TokenizerInfo,
    TokenLogprobs,
)
from treadle.transport.params import check_params, check_submit

Rng = random.Random
_CHECK_EVERY = 20_000
_VOCAB = 500


def seeds() -> list[bytes]:
    """A valid frame of every message."""
    wanted = SamplingParams(n=2, seed=7, stop=["a", "b"], logit_bias={1: 0.5}, stop_token_ids=[3], logprobs=1)
    start = RowStart(1, 2, 0, pack([1, 2]), pack([1]), wanted, 7, pack([3]))
    logprobs = TokenLogprobs(0, 3, 5, -0.5, 1, pack([5]), b"\0\0\0\0")
    values: dict[str, Any] = {"int": 1, "str": "a", "bool": True, "float": 1.0}
    names = Configure.__struct_fields__
    types = Configure.__annotations__
    configure = Configure(**{name: values[str(types[name])] for name in names})
    messages = [
        Hello(2, 0, 123, "token"),
        configure,
        Ready(rank=0, fingerprint="f", num_blocks=9, load_seconds=1.0, weight_bytes=5, kv_bytes=5, backend="b"),
        StepPlan(3, pack([1]), [start], pack([1]), pack([4]), pack([0, 1]), pack([1, 2])),
        StepResult(3, 0, 99, pack([1, 2]), 10, [logprobs], [RowFault(1, "bad")]),
        Failure(0, 3, "engine_failed", "it broke", "details"),
        Shutdown(),
        Submit(id="x", tokens=pack([1, 2, 3]), params=wanted, timeout=1.5, priority=-1, cache_salt="s"),
        Submit(id="y", tokens=pack([4]), params=wanted, outputs=[pack([1]), b""], ended=[1]),
        Abort("x", 1),
        Deltas([Delta("x", 0, [1, 2], "stop", 3, 1, [logprobs], [logprobs], "code", "error")], {"y": 5}, 4),
        Refused("x", "overloaded", "no", 1.0),
        *(InfoRequest("i", kind) for kind in ("server", "tokenizer", "stats", "metrics", "health")),
        Drain("d", 1.0),
        Reload("r", "model"),
        Done("d", "fine"),
        ServerInfo(id="i", version=2, incarnation="a", model="m", max_model_len=9, vocab_size=9, world_size=1),
        TokenizerInfo(
            id="i", tokenizer_json=b"{}", chat_template="", bos_token="", eos_token="", add_bos=True, eos_token_ids=[1]
        ),
        Stats(id="i"),
        ServiceMetrics(id="i"),
        Health(state="ready"),
        Ping(7),
        Pong(7, "a-1", 5),
    ]
    return [msgspec.msgpack.encode(message) for message in messages]


class Mutator:
    """frame() gives the next one. What was interesting, that is decoded, is a beginning for others."""

    def __init__(self, seed: int) -> None:
        self._rng = Rng(seed)
        self._corpus = seeds()
        self._first = len(self._corpus)
        self._ways: list[Callable[[bytearray], None]] = [self._flip, self._byte, self._cut, self._copy, self._swap]

    def frame(self) -> bytes:
        rng = self._rng
        data = bytearray(rng.choice(self._corpus))
        if rng.random() < 0.3:
            self._value(data)
        for _ in range(rng.choice((0, 1, 1, 2, 3, 8))):
            if data:
                rng.choice(self._ways)(data)
        return bytes(data)

    def keep(self, frame: bytes) -> None:
        """At most a few hundred, the valid ones always among them."""
        if len(frame) < 4096 and self._rng.random() < 0.02:
            if len(self._corpus) > 512:
                del self._corpus[self._rng.randrange(self._first, len(self._corpus))]
            self._corpus.append(frame)

    def _flip(self, data: bytearray) -> None:
        data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)

    def _byte(self, data: bytearray) -> None:
        # The bytes that mean something to msgpack: containers, lengths, extremes.
        interesting = bytes.fromhex("00017f80818f90919fa0c0c1c2c4c6c7c9cacbcccfd3d9dbdddfff")
        data[self._rng.randrange(len(data))] = self._rng.choice(interesting)

    def _cut(self, data: bytearray) -> None:
        at = self._rng.randrange(len(data))
        del data[at : at + self._rng.choice((1, 1, 4, len(data)))]

    def _copy(self, data: bytearray) -> None:
        at, length = self._rng.randrange(len(data)), self._rng.choice((1, 4, 16, 64))
        data[at:at] = data[at : at + length] * self._rng.choice((1, 1, 2, 50))

    def _swap(self, data: bytearray) -> None:
        other = self._rng.choice(self._corpus)
        data[self._rng.randrange(len(data)) :] = other[self._rng.randrange(len(other)) :]

    def _value(self, data: bytearray) -> None:
        """Exchanges one value of the structure, so that the frame stays well formed."""
        try:
            value = msgspec.msgpack.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        odd: list[object] = [
            -1,
            0,
            1 << 31,
            -(1 << 63),
            (1 << 64) - 1,
            1e308,
            float("nan"),
            "",
            "\x00",
            b"abc",
            None,
            [],
        ]
        odd += [True, {}, [[]], "x" * 300, b"\xff" * 8, [1] * 70, {"n": 65}, {"temperature": -1.0}]
        if isinstance(value, list) and len(value) > 1:
            value[self._rng.randrange(1, len(value))] = self._rng.choice(odd)
            data[:] = msgspec.msgpack.encode(value)


def fuzz_decoders(frames: int, seed: int) -> dict[str, object]:
    """Every frame into every decoder. Anything but a message or a ProtocolError ends the run."""
    codecs: list[Codec[Any]] = [service_codec(), rank_codec(), engine_codec(), client_codec()]
    mutator = Mutator(seed)
    core = Core(CoreConfig(num_blocks=64, vocab_size=_VOCAB, max_waiting_requests=64), draw_seed=lambda: 1)
    outcomes: Counter[str] = Counter()
    process, memory = psutil.Process(), [0, 0]
    began = time.perf_counter()
    for number in range(frames):
        if number == min(frames // 10, 100_000):
            memory[0] = process.memory_info().rss
        frame = mutator.frame()
        decoded = False
        for codec in codecs:
            try:
                message = codec.decode(frame)
            except ProtocolError:
                continue
            decoded = True
            if isinstance(message, Submit):
                outcomes[_submit(core, message)] += 1
        outcomes["decoded" if decoded else "refused"] += 1
        if decoded:
            mutator.keep(frame)
        if number % _CHECK_EVERY == 0:
            core.check()
    core.check()
    memory[1] = process.memory_info().rss
    stats = core.stats()
    if core.unfinished or stats.blocks_used:
        raise SystemExit(f"the core has kept something: {stats}")
    return {
        "frames": frames,
        "seconds": round(time.perf_counter() - began, 1),
        "outcomes": dict(outcomes),
        "memory_grown_mb": round((memory[1] - memory[0]) / 1e6, 1),
    }


def _submit(core: Core, message: Submit) -> str:
    """As the service does it. What is accepted is ended at once."""
    try:
        check_params(message.params, _VOCAB)
        check_submit(message)
        request = core.add(message, 0.0)
    except TreadleError as error:
        return f"submit: {type(error).__name__}"
    core.abort(request.id, 0.0)
    return "submit: accepted"


async def fuzz_socket(frames: int, seed: int) -> dict[str, object]:
    """Frames to a live service from one client after another, and from one that wants to be served meanwhile."""
    mutator, process = Mutator(seed + 1), psutil.Process()
    with tempfile.TemporaryDirectory(prefix="f-") as directory:
        async with faulty(Path(directory), max_num_seqs=64) as f:
            endpoint = f"ipc://{directory}/s.ipc"
            server = ClientServer(f.service, endpoint, limits=ClientLimits(messages_per_second=1e6))
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            began, memory, sent = time.perf_counter(), [0, 0], 0
            try:
                while sent < frames:
                    count = min(2_000, frames - sent)
                    await _one_client(context, endpoint, mutator, count)
                    sent += count
                    if not memory[0] and sent >= min(frames // 4, 50_000):
                        memory[0] = process.memory_info().rss
                for session in list(server._sessions.values()):
                    server.drop(session)
                memory[1] = process.memory_info().rss
                f.submit_all()
                await f.all_ended()
                stats = f.service.stats()
                healthy = f.service.health().state == "ready" and not f.events and f.exact() and not stats.blocks_used
            finally:
                context.destroy(linger=0)
                server.close()
    if not healthy:
        raise SystemExit(f"the service was disturbed: {stats} {f.events}")
    return {
        "frames": sent,
        "seconds": round(time.perf_counter() - began, 1),
        "bad_frames": stats.bad_frames,
        "memory_grown_mb": round((memory[1] - memory[0]) / 1e6, 1),
    }


async def _one_client(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, mutator: Mutator, count: int) -> None:
    raw = context.socket(zmq.DEALER)
    raw.linger = 0
    raw.connect(endpoint)
    try:
        for number in range(count):
            parts = [mutator.frame()] if number % 50 else [mutator.frame() for _ in range(number % 3 + 2)]
            while True:
                try:
                    raw.send_multipart(parts, zmq.NOBLOCK)
                    break
                except zmq.Again:
                    await asyncio.sleep(0.001)
            if number % 20 == 0:
                await asyncio.sleep(0)
                _read(raw)
        raw.send(msgspec.msgpack.encode(Ping(1)))
        async with asyncio.timeout(30):  # its Pong comes after the answers to all before
            while not _read(raw):
                await asyncio.sleep(0.001)
    finally:
        raw.close(0)


def _read(raw: zmq.Socket[bytes]) -> bool:
    """Reads what there is; whether a Pong to our own ping was among it."""
    codec = client_codec()
    seen = False
    while True:
        try:
            message = codec.decode(raw.recv(zmq.NOBLOCK))
        except zmq.Again:
            return seen
        seen |= isinstance(message, Pong) and message.nonce == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000, help="to the decoders (default %(default)s)")
    parser.add_argument("--socket-frames", type=int, default=20_000, help="to the service (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report = {"decoders": fuzz_decoders(options.frames, options.seed)}
    report["socket"] = asyncio.run(fuzz_socket(options.socket_frames, options.seed))
    print(json.dumps(report, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
