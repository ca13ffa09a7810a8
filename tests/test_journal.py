"""Accepted means that it survives: a service that is killed, and one after it that goes on with what was accepted."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from treadle.errors import ConfigError, ServiceClosed, ServiceStarting
from treadle.scheduler import compaction, journal_file
from treadle.scheduler import journal as journal_module
from treadle.scheduler.journal import Journal, read_journal
from treadle.scheduler.keeping import Keeping
from treadle.scheduler.lifecycle import GroupLost
from treadle.transport.codec import pack, unpack
from treadle.transport.messages import Abort, InfoRequest, Refused, ServerInfo, Submit

from .faultkit import PROMPTS, Collector, Faulty, faulty, params, undisturbed


def submit(key: str, i: int, n: int = 1) -> Submit:
    wanted = msgspec.structs.replace(params(i), n=n)
    return Submit(id=f"id-{key}", tokens=pack(PROMPTS[i]), params=wanted, key=key)


def outputs(message: Submit) -> list[list[int]]:
    return [unpack(output).tolist() for output in message.outputs]


@pytest.mark.asyncio
async def test_what_is_unfinished_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, 0.0)
    first, second, third = (journal.accept(submit(key, i, n=2)) for i, key in enumerate("abc"))
    for token in range(5):
        journal.token(first, 0, token)
        journal.token(second, 1, 100 + token)
    journal.end(second, 0)
    journal.end(third, 0)
    journal.end(third, 1)
    journal.flush()
    found = read_journal(path)
    assert [message.key for message in found.values()] == ["a", "b"]
    assert outputs(found[first]) == [[0, 1, 2, 3, 4], []] and found[first].ended == []
    assert outputs(found[second]) == [[], [100, 101, 102, 103, 104]] and found[second].ended == [0]
    with pytest.raises(ConfigError, match="another service"):
        Journal(path, 0.0)
    await journal.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Journal(path, 0.0)
    assert again.unfinished == found
    again.token(first, 0, 5)
    assert again.accept(submit("d", 0)) > second
    await again.close()
    assert outputs(read_journal(path)[first])[0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.asyncio
async def test_a_torn_or_spoiled_end_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, 0.0)
    number = journal.accept(submit("a", 0))
    sizes = []
    for token in range(20):
        journal.token(number, 0, token)
        journal.flush()
        sizes.append(path.stat().st_size)
    await journal.close()
    whole = path.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        at = rng.randrange(sizes[0], len(whole))
        path.write_bytes(whole[:at])
        intact = sum(size <= at for size in sizes)
        assert outputs(read_journal(path)[number])[0] == list(range(intact))
        spoiled = bytearray(whole)
        spoiled[at] ^= 1 << rng.randrange(8)
        path.write_bytes(spoiled)
        assert outputs(read_journal(path)[number])[0] == list(range(intact))


@pytest.mark.parametrize("content", [b"my notes", b"treadle journal 2\n", bytes(100)])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no journal of this version"):
        Journal(path, 0.0)
    assert path.read_bytes() == content


@pytest.mark.asyncio
async def test_a_journal_that_was_hardly_begun_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "j"
    await Journal(path, 0.0).close()
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal(path, 0.0)
        assert not journal.unfinished
        await journal.close()
        assert path.read_bytes() == whole


class SlowReading:
    """A journal that is read takes until `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = asyncio.Event()
        self._may_end = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._real = journal_module.read_journal
        monkeypatch.setattr(journal_module, "read_journal", self._read)

    def go_on(self) -> None:
        self._may_end.set()

    def _read(self, path: Path) -> dict[int, Submit]:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self._may_end.wait(60), "the loop stood still"
        return self._real(path)


def send(f: Faulty, sink: Collector, key: str, i: int, have: list[int] | None = None) -> None:
    message = submit(key, i)
    if have is not None:
        message = msgspec.structs.replace(message, outputs=[pack(have)])
    f.service.submit(message, sink)


@pytest.mark.asyncio
async def test_another_service_goes_on_with_what_was_accepted(tmp_path: Path) -> None:
    """Clients that have more or less than the journal, come late, or never come back."""
    path = str(tmp_path / "journal")
    first = tmp_path / "1"
    first.mkdir()
    async with faulty(first, pace=0.01, journal=path) as f:
        for i in range(4):
            send(f, f.sink, str(i), i)
        await f.sink.begun("id-3", 5)
    before = {i: f.sink.tokens[f"id-{i}"] for i in range(4)}
    assert all(len(tokens) < 40 for tokens in before.values())
    found = read_journal(Path(path))
    assert {int(message.key): outputs(message)[0] for message in found.values()} == before, "as it was told"

    async with faulty(tmp_path, pace=0.002, journal=path) as f:
        wanted = [undisturbed(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
        send(f, f.sink, "0", 0, before[0])
        send(f, f.sink, "1", 1, wanted[1][: len(before[1]) + 3])  # it was told more than was written, as after a fall
        await f.sink.ended("id-0", "id-1")
        assert before[0] + f.sink.tokens["id-0"] == wanted[0]
        assert wanted[1][: len(before[1]) + 3] + f.sink.tokens["id-1"] == wanted[1]
        async with asyncio.timeout(20):
            while f.service.unfinished:
                await asyncio.sleep(0.01)
        send(f, f.sink, "2", 2, before[2][:2])
        await f.sink.ended("id-2")
        assert before[2][:2] + f.sink.tokens["id-2"] == wanted[2], (
            "it ended without its reader, who gets it all the same"
        )
        assert not f.sink.open
        assert f.service._keeping is not None
        f.service._keeping.drop_orphans()
    assert not read_journal(Path(path)), "everything has ended"


@pytest.mark.asyncio
async def test_a_claimed_request_can_be_aborted(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    first = tmp_path / "1"
    first.mkdir()
    async with faulty(first, pace=0.02, journal=path) as f:
        send(f, f.sink, "a", 0)
        await f.sink.begun("id-a", 2)
    async with faulty(tmp_path, pace=0.02, journal=path) as f:
        send(f, f.sink, "a", 0, [])
        assert f.service.unfinished == 1
        f.service.abort(Abort("id-a"), f.sink)
        await f.sink.ended("id-a")
        assert f.service.unfinished == 0 and f.sink.last["id-a"].finish == "abort"


@pytest.mark.asyncio
async def test_a_full_disk_ends_the_journal_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, 0.0)
    journal.accept(submit("kept", 0))
    journal.flush()
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # a record is begun, and cannot be written whole
    try:
        journal.accept(submit("lost", 1))
        journal.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "nothing more is kept" in caplog.text
    journal.end(0, 0)
    journal.flush()
    await journal.close()
    assert [message.key for message in read_journal(path).values()] == ["kept"]
    assert path.stat().st_size == size


@pytest.mark.asyncio
async def test_a_journal_whose_open_requests_are_large_is_not_written_anew_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_COMPACT_BYTES", 1)
    replaced: list[object] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (replaced.append(paths), replace(*paths)))
    journal = Journal(tmp_path / "journal", 0.0)
    for i in range(64):
        journal.accept(submit(str(i), 0))
        journal.flush()
        if journal._compacting is not None:
            await journal._compacting
    await journal.close()
    assert 1 < len(replaced) <= 9, "once for every doubling"
    assert len(read_journal(tmp_path / "journal")) == 64


@pytest.mark.asyncio
async def test_a_journal_is_written_anew_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes before, during and after; the loop takes its turns meanwhile."""
    monkeypatch.setattr(journal_module, "_next_size", lambda size: 0)
    monkeypatch.setattr(compaction, "_LAST_BYTES", 50)
    path, rng = tmp_path / "journal", random.Random(3)
    journal = Journal(path, 0.0)
    expected: dict[int, list[int]] = {}
    replaced: list[object] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (replaced.append(paths), replace(*paths)))
    turn = 0
    while len(replaced) < 3:
        turn += 1
        if len(expected) < 20:
            expected[journal.accept(submit(str(turn), 0))] = []
        for number in rng.sample(list(expected), min(5, len(expected))):
            journal.token(number, 0, turn)
            expected[number].append(turn)
        if turn % 3 == 0:
            number = rng.choice(list(expected))
            journal.end(number, 0)
            del expected[number]
        journal.flush()
        if turn % 100 == 0 and journal._compacting is not None:
            await journal._compacting  # or it never ends, where the loop is quicker than the thread
        await asyncio.sleep(0)
    await journal.close()
    assert not (tmp_path / "journal.new").exists()
    assert {number: outputs(message)[0] for number, message in read_journal(path).items()} == expected


@pytest.mark.asyncio
async def test_a_journal_that_cannot_be_written_anew_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk has no room for two: what fits behind the first is kept, and the beginning of the second is not left."""
    path = tmp_path / "journal"
    journal = Journal(path, 0.0)
    number = journal.accept(submit("kept", 0))
    journal.flush()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_file, "write_all", full)
    journal._compact_at = 0
    journal.token(number, 0, 1)
    journal.flush()
    assert journal._compacting is not None
    await journal._compacting
    assert "No space left" in caplog.text and not (tmp_path / "journal.new").exists()
    journal.token(number, 0, 2)
    journal.flush()
    await journal.close()
    assert outputs(read_journal(path)[number]) == [[1, 2]]


class FullDisk:
    """A disk with room for a few bytes while a journal is written anew, which lasts until `give_up`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = asyncio.Event()
        self._full = True
        self._may_end = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._real = journal_file.write_all
        monkeypatch.setattr(journal_module, "write_all", self._write)
        monkeypatch.setattr(compaction, "write_anew", self._write_anew)

    def give_up(self) -> None:
        self._may_end.set()

    def _write(self, file: int, data: bytearray) -> None:
        if self._full and self.begun.is_set():
            with memoryview(data) as view:
                os.write(file, view[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        self._real(file, data)

    def _write_anew(self, *_: object) -> tuple[int, int]:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self._may_end.wait(60)
        self._full = False
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.asyncio
@pytest.mark.parametrize("closed", [False, True])
async def test_a_disk_that_is_full_of_the_second_file_ends_no_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed: bool
) -> None:
    """What comes meanwhile waits, and is written when the second is given up, though nothing comes after it."""
    path, disk = tmp_path / "journal", FullDisk(monkeypatch)
    journal = Journal(path, 0.0)
    journal._compact_at = 0
    number = journal.accept(submit("kept", 0))
    journal.flush()
    size = path.stat().st_size
    await disk.begun.wait()
    for token in range(3):
        journal.token(number, 0, token)
        journal.flush()
        assert path.stat().st_size == size, "no half record"
    disk.give_up()
    if not closed:
        assert journal._compacting is not None
        await journal._compacting
        assert outputs(read_journal(path)[number]) == [[0, 1, 2]]
    await journal.close()
    assert outputs(read_journal(path)[number]) == [[0, 1, 2]]
    assert "nothing more is kept" not in caplog.text


@pytest.mark.asyncio
async def test_what_is_copied_on_the_loop_is_little_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that came before the last round is synced with it; a disk that never comes close enough keeps its file."""
    path, new = tmp_path / "journal", tmp_path / "journal.new"
    path.write_bytes(bytes(100))
    size = [0]
    monkeypatch.setattr(compaction, "write_anew", lambda *_: (os.open(new, os.O_RDWR | os.O_CREAT | os.O_APPEND), 0))
    synced: list[int] = []
    fsync = os.fsync

    def sync(file: int) -> None:
        synced.append(os.fstat(file).st_size)
        fsync(file)
        size[0] += coming

    monkeypatch.setattr(os, "fsync", sync)
    run = compaction.Compaction(path, new).run
    coming = 1
    made = await run(lambda: size[0] + 10 * bool(new.exists()))
    assert (made.copied, made.size, synced) == (10, 10, [10]), "however little it was"
    journal_file.discard(new, made.file)
    coming, size[0] = 20, 0
    monkeypatch.setattr(compaction, "_LAST_BYTES", 15)
    monkeypatch.setattr(compaction, "_MOST_LAST_BYTES", 19)
    with pytest.raises(OSError, match="20 bytes came"):
        await run(lambda: size[0])
    assert synced[1:] == [0, 20, 40, 60] and not new.exists()


@pytest.mark.asyncio
@pytest.mark.parametrize("at", ["replace", "fsync"])
async def test_a_journal_that_cannot_take_its_place_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = tmp_path / "journal"
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        if at == "replace":
            patched.setattr(os, "replace", fail)
        else:
            patched.setattr(journal_module, "sync_directory", fail)
        with pytest.raises(ConfigError, match="Input/output error"):
            Journal(path, 0.0)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not (tmp_path / "journal.new").exists()
    await Journal(path, 0.0).close()


@pytest.mark.asyncio
async def test_a_journal_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="journal"):
        Journal(tmp_path / "file" / "j", 0.0)
    (tmp_path / "directory").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        Journal(tmp_path / "directory", 0.0)


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled", [0, 1, 3])
async def test_the_loop_goes_on_while_a_journal_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: int
) -> None:
    """Whoever does not wait for it leaves it closed, for the next service, however often it is told not to wait."""
    reading = SlowReading(monkeypatch)
    (tmp_path / "journal").touch()
    opening = asyncio.create_task(Keeping.open(str(tmp_path / "journal"), 0.0, lambda name, index: None))
    await reading.begun.wait()
    for _ in range(cancelled):
        opening.cancel()
        await asyncio.sleep(0)  # it is told of each
    reading.go_on()
    if cancelled:
        with pytest.raises(asyncio.CancelledError):
            await opening
    else:
        await (await opening).close()
    await Journal(tmp_path / "journal", 0.0).close()


@pytest.mark.asyncio
async def test_a_rank_that_dies_while_the_journal_is_read_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks it for anything yet, and it is said only once; clients are told meanwhile to ask again."""
    reading, died = SlowReading(monkeypatch), asyncio.Event()
    (tmp_path / "journal").touch()
    f = Faulty(tmp_path, [], 0.0, {"journal": str(tmp_path / "journal"), "tensor_parallel_size": 1})
    starting = asyncio.create_task(f.service.start())
    try:
        await reading.begun.wait()
        answer = f.service.answer(InfoRequest("q", "server"))
        assert isinstance(answer, Refused) and answer.code == ServiceStarting.code
        group = f.service._standing.group
        assert group is not None
        told = group._on_death
        monkeypatch.setattr(group, "_on_death", lambda death: (told(death), died.set()))
        os.kill(group.pids[0], signal.SIGKILL)
        await died.wait()
        reading.go_on()
        await starting
        assert [type(event) for event in f.events] == [GroupLost]
        assert isinstance(f.service.answer(InfoRequest("q", "server")), ServerInfo)
        send(f, f.sink, "a", 0)
        await f.sink.ended("id-a")
        assert f.sink.tokens["id-a"] == undisturbed(PROMPTS[0], params(0))
    finally:
        reading.go_on()
        await f.service.close()


@pytest.mark.asyncio
async def test_a_service_that_is_closed_while_it_starts_stays_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = SlowReading(monkeypatch)
    (tmp_path / "journal").touch()
    f = Faulty(tmp_path, [], 0.0, {"journal": str(tmp_path / "journal"), "tensor_parallel_size": 1})
    starting = asyncio.create_task(f.service.start())
    await reading.begun.wait()
    await f.service.close()
    reading.go_on()
    with pytest.raises(ServiceClosed, match="while it started"):
        await starting
    assert f.service.health().state == "closed"
    monkeypatch.undo()
    await Journal(tmp_path / "journal", 0.0).close()
    with pytest.raises(ServiceClosed):
        await f.service.start()
