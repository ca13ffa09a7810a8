"""Frames: what goes in comes out, and nothing hostile gets through."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import ProtocolError, TreadleError
from treadle.transport.codec import Digest, client_codec, engine_codec, pack, rank_codec, service_codec, unpack
from treadle.transport.messages import Delta, Deltas, SamplingParams, StepPlan, StepResult, Submit


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_integers_survive(values: list[int]) -> None:
    assert unpack(pack(values)).tolist() == values


def test_integers_are_little_endian_int32() -> None:
    assert pack([1, -1]) == b"\x01\x00\x00\x00\xff\xff\xff\xff"
    with pytest.raises(ProtocolError, match="multiple of 4"):
        unpack(b"abc")


def test_messages_survive() -> None:
    plan = StepPlan(7, pack([1]), [], pack([2]), pack([3]), pack([4]), pack([5]))
    assert rank_codec().decode(engine_codec().encode(plan)) == plan
    result = StepResult(7, 0, 123, pack([9]), 55)
    assert engine_codec().decode(rank_codec().encode(result)) == result
    submit = Submit(id="a", tokens=pack([1, 2]), params=SamplingParams(stop=["x"], logit_bias={3: 1.5}, seed=2**63))
    assert service_codec().decode(client_codec().encode(submit)) == submit
    deltas = Deltas([Delta("a", 0, [1, 2], "stop", 2)])
    assert client_codec().decode(service_codec().encode(deltas)) == deltas


def test_a_steady_decode_step_of_a_thousand_rows_is_small() -> None:
    rows = np.arange(1024)
    plan = StepPlan(1, b"", [], pack(rows[:64]), pack(rows[:64]), pack(rows), pack(np.ones(1024)))
    assert len(engine_codec().encode(plan)) < 10_000


@given(st.binary(max_size=300))
def test_hostile_frames_are_protocol_errors(frame: bytes) -> None:
    for codec in (rank_codec(), engine_codec(), service_codec(), client_codec()):
        try:
            codec.decode(frame)
        except ProtocolError:
            continue


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x93",
        msgspec.msgpack.encode(["Submit", "id"]),
        msgspec.msgpack.encode(["Nothing", 1]),
        msgspec.msgpack.encode(["StepPlan", 1, b"", [], b"", b"", b"", b""]),
        b"\x91" * 50_000,
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_frames_of_another_conversation_are_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        service_codec().decode(frame)


def test_a_frame_that_is_too_long_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="at most"):
        service_codec().decode(b"\x00" * ((16 << 20) + 1))


def test_unknown_sampling_fields_are_refused() -> None:
    frame = client_codec().encode(Submit(id="a", tokens=b"", params=SamplingParams(temperature=0.5)))
    with pytest.raises(ProtocolError, match="temperatura"):
        service_codec().decode(frame.replace(b"\xabtemperature", b"\xabtemperatura"))


def test_digest_depends_on_every_byte_and_the_order() -> None:
    def digest(*parts: bytes) -> int:
        running = Digest()
        for part in parts:
            running.add(part)
        return running.value

    assert digest(b"ab", b"c") == digest(b"a", b"bc")
    assert digest(b"a", b"b") != digest(b"b", b"a")


def test_wire_errors_come_back_as_the_same_type() -> None:
    from treadle import errors

    def kinds(cls: type[TreadleError]) -> list[type[TreadleError]]:
        return [cls, *(kind for sub in cls.__subclasses__() for kind in kinds(sub))]

    for cls in kinds(TreadleError):
        assert type(errors.from_wire(cls.code, "text")) is cls
    assert errors.from_wire("overloaded", "busy", 2.5).retry_after == 2.5  # type: ignore[attr-defined]
    assert "from_the_future: text" in str(errors.from_wire("from_the_future", "text"))
