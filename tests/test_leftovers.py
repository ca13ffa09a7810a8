"""A directory of one's own, while others clear up: it is there, or it is another; never one that nobody can find."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from treadle.transport import leftovers

Lock = Callable[[int, int], None]


def locking(monkeypatch: pytest.MonkeyPatch, first: Callable[[int], None]) -> None:
    """`first` has the descriptor before the first lock is taken."""
    real: Lock = fcntl.flock
    waiting = [first]

    def flock(descriptor: int, operation: int) -> None:
        if waiting:
            waiting.pop()(descriptor)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_directory_that_is_cleared_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_before = descriptors()
    locking(monkeypatch, lambda _: leftovers.clear(tmp_path))
    path, lock = leftovers.make(tmp_path)
    assert list(tmp_path.iterdir()) == [path], "the first is gone"
    leftovers.clear(tmp_path)
    assert [entry.name for entry in path.iterdir()] == ["lock"], "it is in use"
    os.close(lock)
    assert descriptors() == open_before
    leftovers.clear(tmp_path)
    assert not path.exists()


def test_a_directory_that_is_being_cleared_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def hold(_: int) -> None:
        (found,) = tmp_path.glob("*/lock")
        held.append(os.open(found, os.O_RDWR))
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)

    locking(monkeypatch, hold)
    path, lock = leftovers.make(tmp_path)
    assert not os.path.samestat(os.fstat(held[0]), (path / "lock").stat())
    os.close(held[0])
    os.close(lock)


@pytest.mark.parametrize("at", ["open", "flock"])
def test_where_it_cannot_be_locked_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    open_before = descriptors()
    with monkeypatch.context() as patched:
        if at == "open":
            patched.setattr(os, "open", fail)
        else:
            patched.setattr(fcntl, "flock", fail)
        with pytest.raises(OSError, match="Too many open files"):
            leftovers.make(tmp_path)
    assert descriptors() == open_before
    assert not list(tmp_path.iterdir())
