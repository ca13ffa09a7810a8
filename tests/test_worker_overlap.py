"""The loop of a rank that overlaps: launches at once, answers in order, sleeps when there is nothing to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import zmq

from treadle.engine.cuda.runner import PipelinedRunner, Ticket
from treadle.engine.runner import StepOutcome
from treadle.engine.worker import _Loop
from treadle.transport.codec import Digest, engine_codec, pack, rank_codec, unpack
from treadle.transport.messages import Masks, Shutdown, StepPlan, StepResult

NOTHING = np.empty(0, np.int64)


@dataclass
class SlowDevice:
    """Steps end when the test says so; the token of a step is its number."""

    launched: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    finished: int = 0

    def submit(self, plan: StepPlan) -> Ticket:
        self.launched.append(plan.step)
        return Ticket(plan.step, 1, NOTHING, NOTHING, NOTHING)

    def sample(self, ticket: Ticket, masks: Masks) -> None:
        assert ticket.turn == masks.step == self.launched[-1], "nothing else was launched before"
        self.sampled.append(masks.step)

    def done(self, ticket: Ticket) -> bool:
        return ticket.turn < self.finished

    def collect(self, ticket: Ticket) -> StepOutcome:
        assert self.done(ticket)
        return StepOutcome(np.array([ticket.turn]))


@pytest.fixture
def rank() -> Iterator[tuple[zmq.Socket[bytes], SlowDevice]]:
    """A loop on a thread, the scheduler's end of its socket, and its device."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ours, theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ours.bind("inproc://rank")
    theirs.connect("inproc://rank")
    ours.setsockopt(zmq.RCVTIMEO, 5_000)
    device = SlowDevice()
    assert isinstance(device, PipelinedRunner)
    thread = threading.Thread(target=_Loop(theirs, rank_codec(), 0).run_overlapped, args=(device,))
    thread.start()
    yield ours, device
    ours.send(engine_codec().encode(Shutdown()))
    thread.join(5)
    assert not thread.is_alive()
    context.destroy(linger=0)


def plan(step: int, guided: bool = False) -> bytes:
    waits = pack([0]) if guided else b""
    return engine_codec().encode(StepPlan(step, b"", [], b"", b"", pack([0]), pack([1]), waits))


def masks(step: int) -> bytes:
    return engine_codec().encode(Masks(step, pack([-1]), *[b""] * 5))


def eventually(device: SlowDevice, launched: list[int]) -> None:
    end = time.monotonic() + 5
    while device.launched != launched and time.monotonic() < end:
        time.sleep(0.001)
    assert device.launched == launched


def answer(socket: zmq.Socket[bytes]) -> StepResult:
    result = engine_codec().decode(socket.recv())
    assert isinstance(result, StepResult)
    return result


def test_steps_are_launched_before_the_last_is_done_and_answered_in_order(
    rank: tuple[zmq.Socket[bytes], SlowDevice],
) -> None:
    socket, device = rank
    digest = Digest()
    for step in (0, 1):
        socket.send(plan(step))
    eventually(device, [0, 1])
    assert socket.poll(20) == 0, "nothing is done, so nothing is answered"
    device.finished = 1
    first = answer(socket)
    socket.send(plan(2))
    eventually(device, [0, 1, 2])
    device.finished = 3
    results = [first, answer(socket), answer(socket)]
    for step, result in enumerate(results):
        digest.add(plan(step))
        assert (result.step, unpack(result.tokens).tolist()) == (step, [step])
        assert result.digest == digest.add(pack([step])), "plan and tokens of each step, in the order of the steps"


def test_a_guided_step_samples_when_its_masks_come_and_holds_what_is_behind_it(
    rank: tuple[zmq.Socket[bytes], SlowDevice],
) -> None:
    socket, device = rank
    device.finished = 9
    socket.send(plan(0, guided=True))
    socket.send(plan(1, guided=True))
    socket.send(plan(2))
    eventually(device, [0])
    assert socket.poll(20) == 0, "its masks are missing, whatever the device says"
    socket.send(masks(1))  # early
    assert socket.poll(20) == 0 and device.launched == [0]
    socket.send(masks(0))
    results = [answer(socket) for _ in range(3)]
    assert (device.launched, device.sampled) == ([0, 1, 2], [0, 1])
    digest = Digest()
    for step, result in enumerate(results):
        digest.add(plan(step, guided=step < 2))
        digest.add(masks(step) if step < 2 else b"")
        assert (result.step, result.digest) == (step, digest.add(pack([step])))


def test_an_end_is_heard_while_masks_are_missing(rank: tuple[zmq.Socket[bytes], SlowDevice]) -> None:
    socket, device = rank
    socket.send(plan(0, guided=True))
    eventually(device, [0])  # the fixture sends Shutdown and joins


def test_an_idle_loop_costs_nothing(rank: tuple[zmq.Socket[bytes], SlowDevice]) -> None:
    socket, device = rank
    device.finished = 1
    socket.send(plan(0))
    answer(socket)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03
