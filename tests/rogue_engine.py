"""A rank without a model that misbehaves to order: `FakeEngine` behind the arguments and the protocol of a real rank.

Run by `EngineGroup` as `python -m tests.rogue_engine --vocab N --faults FILE …`. The file has lines
`RANK STEPS DEED [GROUP]`: this rank does the deed at its STEPS-th step; 0 is while it loads, -1 before it says hello.
Each line is done once, by whichever group comes first where none is named.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import zmq

from treadle.engine import lifeline
from treadle.errors import CorruptWeights, EngineFailed
from treadle.scheduler.config import CoreConfig
from treadle.scheduler.fake_engine import FakeEngine
from treadle.transport.codec import pack, rank_codec, unpack
from treadle.transport.messages import (
    PROTOCOL_VERSION,
    Configure,
    Failure,
    Hello,
    Loading,
    Ping,
    Ready,
    RowFault,
    StepPlan,
    StepResult,
)
from treadle.transport.sockets import rank_socket

BIRTH = -1
LOADING = 0


class Rogue:
    """One rank. `deed(steps)` is what it is to do wrong now, "" for nothing."""

    def __init__(self, socket: zmq.Socket[bytes], rank: int, group: str, faults: Path, vocab: int, pace: float) -> None:
        self.socket = socket
        self.codec = rank_codec()
        self.rank = rank
        self.group = group
        self.faults = faults
        self.vocab = vocab
        self.pace = pace

    def deed(self, steps: int) -> str:
        for number, line in enumerate(self.faults.read_text().splitlines()):
            rank, when, deed, *group = line.split()
            if int(rank) == self.rank and int(when) == steps and group in ([], [self.group]):
                try:
                    os.close(os.open(f"{self.faults}.{number}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                return deed
        return ""

    def send(self, message: msgspec.Struct) -> None:
        self.socket.send(self.codec.encode(message))

    def be_born(self) -> None:
        end_oneself(self.deed(BIRTH))
        self.send(Hello(PROTOCOL_VERSION, self.rank, os.getpid(), os.environ.pop("TREADLE_GROUP_TOKEN", "")))

    def run(self) -> int:
        configure = self.codec.decode(self.socket.recv())
        assert isinstance(configure, Configure)
        self.send(Loading(self.rank, 0, 100))
        deed = self.deed(LOADING)
        if deed == "bad-weights":
            self.fail(-1, CorruptWeights.code, "CorruptWeights: model.safetensors ends too early")
            return 1
        end_oneself(deed)
        self.send(self.ready(configure))
        engine = FakeEngine(config_of(configure, self.vocab), configure.world_size)
        steps = 0
        while True:
            frame = self.socket.recv()
            plan = self.codec.decode(frame)
            if isinstance(plan, Ping):
                continue
            if not isinstance(plan, StepPlan):
                return 0
            steps += 1
            began = time.perf_counter()
            time.sleep(self.pace)
            forwarded = time.perf_counter()
            engine.submit(frame)
            result = timed(engine.step()[self.rank], began, forwarded, time.perf_counter())
            code = self.answer(plan, result, self.deed(steps))
            if code >= 0:
                return code

    def answer(self, plan: StepPlan, result: StepResult, deed: str) -> int:
        """Sends the result, or does the deed. Returns the exit code, -1 to go on."""
        change = msgspec.structs.replace
        if deed == "raise":
            self.fail(plan.step, EngineFailed.code, "RuntimeError: something broke")
            return 1
        if deed == "memory":
            self.fail(plan.step, "does_not_fit", "OutOfMemoryError: 20 MiB were not to be had")
            return 1
        if deed == "exit":
            return 7
        end_oneself(deed)
        if deed == "close":
            self.socket.close(0)
            time.sleep(600)
        if deed == "leave":
            self.send(result)
            self.socket.close(2_000)
            time.sleep(600)
        if deed == "garbage":
            self.socket.send(b"\xff\x00 not a message")
        elif deed == "unasked":
            self.send(change(result, step=plan.step + 10))
        elif deed == "twice":
            self.send(result)
            self.send(result)
        elif deed == "impostor":
            self.send(change(result, rank=self.rank + 1))
        elif deed == "digest":
            self.send(change(result, digest=result.digest ^ 1))
        elif deed == "tokens":
            self.send(change(result, tokens=result.tokens + pack([1])))
        elif deed == "row":
            self.send(change(result, faults=[RowFault(int(unpack(plan.rows)[0]), "its bias is not a number")]))
        else:
            self.send(result)
        return -1

    def fail(self, step: int, code: str, message: str) -> None:
        self.send(Failure(self.rank, step, code, message, ""))
        self.socket.close(2_000)

    def ready(self, configure: Configure) -> Ready:
        return Ready(
            rank=self.rank,
            fingerprint=configure.model,
            num_blocks=configure.num_blocks,
            load_seconds=0.0,
            weight_bytes=0,
            kv_bytes=0,
            backend="none",
            swap_blocks=configure.swap_blocks,
        )


def end_oneself(deed: str) -> None:
    """If that is the deed."""
    if deed == "abort":
        os.abort()
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if deed == "hang":
        time.sleep(600)


def timed(result: StepResult, began: float, forwarded: float, ended: float) -> StepResult:
    """The pace is what it calls its forward pass."""
    first, middle, last = (round(at * 1e6) for at in (began, forwarded, ended))
    return msgspec.structs.replace(
        result, elapsed_us=last - first, began_us=first, forward_us=middle - first, sample_us=last - middle
    )


def config_of(configure: Configure, vocab: int) -> CoreConfig:
    return CoreConfig(
        num_blocks=configure.num_blocks,
        block_size=configure.block_size,
        max_num_seqs=configure.max_num_seqs,
        max_num_batched_tokens=configure.max_num_batched_tokens,
        max_model_len=configure.max_model_len,
        vocab_size=vocab,
        swap_blocks=configure.swap_blocks,
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--faults", type=Path, required=True)
    parser.add_argument("--pace", type=float, default=0.0)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--lifeline", type=int, required=True)
    parser.add_argument("--masks", type=int, default=-1)
    parser.add_argument("--leftover", type=Path, action="append", default=[])
    parser.add_argument("--stacks", type=Path)
    parser.add_argument("--no-native", action="store_true")
    options = parser.parse_args()
    lifeline.watch(options.lifeline, options.leftover)
    if options.stacks is not None:
        faulthandler.register(signal.SIGUSR1, options.stacks.open("w"), all_threads=True)
    socket = rank_socket(zmq.Context.instance(), options.rank)
    socket.connect(options.endpoint)
    group = options.endpoint.rpartition("-")[2].removesuffix(".ipc")
    rogue = Rogue(socket, options.rank, group, options.faults, options.vocab, options.pace)
    rogue.be_born()
    return rogue.run()


if __name__ == "__main__":
    code = main()
    zmq.Context.instance().destroy(linger=2_000)
    sys.stdout.flush()
    os._exit(code)
