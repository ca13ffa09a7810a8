"""A short form of scripts/fuzz_frames.py: nothing that arrives as a frame may disturb anybody."""

from __future__ import annotations

import asyncio
import random

import pytest

from scripts.fuzz_frames import Mutator, fuzz_decoders, fuzz_socket, seeds
from treadle.errors import ProtocolError
from treadle.transport.codec import client_codec, engine_codec, rank_codec, service_codec


def test_decoders_take_anything() -> None:
    report = fuzz_decoders(30_000, seed=random.randrange(1 << 30))
    outcomes = report["outcomes"]
    assert isinstance(outcomes, dict)
    assert outcomes["refused"] > 1_000 and outcomes["decoded"] > 1_000 and outcomes["submit: accepted"] > 10


def test_the_socket_takes_anything() -> None:
    report = asyncio.run(fuzz_socket(5_000, seed=random.randrange(1 << 30)))
    bad = report["bad_frames"]
    assert isinstance(bad, int) and bad > 1_000


def test_every_seed_is_a_message_of_somebody() -> None:
    codecs = [service_codec(), rank_codec(), engine_codec(), client_codec()]
    for frame in seeds():
        decoded = 0
        for codec in codecs:
            try:
                codec.decode(frame)  # type: ignore[attr-defined]
            except ProtocolError:
                continue
            decoded += 1
        assert decoded, frame


def test_a_seed_gives_the_same_frames() -> None:
    assert [Mutator(3).frame() for _ in range(50)] == [Mutator(3).frame() for _ in range(50)]
    assert [Mutator(3).frame()] != [Mutator(4).frame()]


@pytest.mark.parametrize(
    "frame", [b"", b"\x91" * 100_000, b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x80\x04\x95."]
)
def test_deep_huge_and_pickled_frames_are_refused(frame: bytes) -> None:
    for codec in (service_codec(), rank_codec(), engine_codec(), client_codec()):
        with pytest.raises(ProtocolError):
            codec.decode(frame)  # type: ignore[attr-defined]
