"""The file of events: whole frames or none, and whatever is wrong with it is said."""

from __future__ import annotations

import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from treadle.errors import ConfigError, EventLogError
from treadle.scheduler.event_log import (
    VERSION,
    AnyEvent,
    EventReader,
    EventWriter,
    Expired,
    FailedAll,
    OutputDigest,
    Tail,
)

DIGEST = OutputDigest(1, 2, 3, 4, 0xFFFFFFFF)


def some(count: int) -> list[Expired]:
    return [Expired(i / 8, DIGEST) for i in range(count)]


def write(path: Path, *events: AnyEvent) -> None:
    writer = EventWriter(path)
    for event in events:
        writer.write(event)
    writer.close()


def read(path: Path) -> tuple[list[AnyEvent], Tail | None]:
    reader = EventReader(path)
    return list(reader), reader.tail


def test_what_is_written_is_read_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch(0o644)
    events = [*some(3), FailedAll(1.0, "code", "gone", DIGEST, "ValueError: no")]
    write(path, *events)
    assert read(path) == (events, None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write(path, *some(2))
    assert read(path) == ([*events, *some(2)], None), "a later run goes behind it"


def test_every_cut_is_a_torn_tail_and_all_before_is_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, *some(2))
    first = path.stat().st_size
    write(path, *some(1))
    whole = path.read_bytes()
    for cut in range(first + 1, len(whole)):
        path.write_bytes(whole[:cut])
        events, tail = read(path)
        assert events == some(2)
        assert tail is not None and tail.torn and (tail.offset, tail.event) == (first, 2)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, *some(1))
    first = path.stat().st_size
    write(path, *some(3)[1:])
    whole = path.read_bytes()
    second = first + (len(whole) - first) // 2
    for place in range(first, second):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            events, tail = read(path)
            assert events == some(1)
            assert tail is not None and not tail.torn and tail.event == 1, "a flipped bit passes for a torn tail"


def test_a_torn_tail_is_removed_before_more_is_written_and_damage_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    write(path, *some(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    write(path, *some(1))
    assert read(path) == ([some(2)[0], *some(1)], None)
    damaged = bytearray(path.read_bytes())
    damaged[30] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(EventLogError, match="damaged at byte 16, event 0"):
        EventWriter(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an event log"),
        (b"something else altogether", "not an event log"),
        (struct.pack("<14sH", b"treadle-events", VERSION + 1), f"version {VERSION + 1}; this program reads {VERSION}"),
    ],
)
def test_other_files_and_versions_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(EventLogError, match=says):
        read(path)
    if content:
        with pytest.raises(EventLogError, match=says):
            EventWriter(path)
        assert path.read_bytes() == content


def test_paths_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "log"):
        with pytest.raises(ConfigError, match="event_log="):
            EventWriter(path)
    writer = EventWriter(tmp_path / "log")
    with pytest.raises(ConfigError, match="another service writes to it"):
        EventWriter(tmp_path / "log")
    writer.close()
    writer.write(some(1)[0])  # closed: nothing happens
    EventWriter(tmp_path / "log").close()


def test_a_full_disk_ends_the_log_after_a_whole_event(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    write(path, *some(1))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = EventWriter(path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, limits[1]))
        for event in some(2):
            writer.write(event)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "the service goes on" in caplog.text
    assert read(path) == ([*some(1), *some(1)], None), "a part of the second was written, and is gone again"


WRITER = """
import sys
from pathlib import Path
from treadle.scheduler.event_log import EventWriter, Expired
writer = EventWriter(Path(sys.argv[1]))
print("begun", flush=True)
number = 0
while True:
    writer.write(Expired(float(number), None, "x" * 5000))
    number += 1
"""


def test_a_killed_writer_loses_nothing_but_its_last_event(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        end = time.monotonic() + 20
        while path.stat().st_size < 1 << 20:
            assert time.monotonic() < end
            os.sched_yield()
        process.kill()
    events, tail = read(path)
    assert [event.now for event in events if isinstance(event, Expired)] == [float(i) for i in range(len(events))]
    assert len(events) > 200 and (tail is None or tail.torn)
