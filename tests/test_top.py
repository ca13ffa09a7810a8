"""`treadle top`, driven by a pilot over a real service, and as a program in a terminal."""

from __future__ import annotations

import asyncio
import html
import logging
import os
import pty
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.pilot import Pilot

from treadle import commands
from treadle.errors import ServerLost
from treadle.scheduler.client_server import ClientServer
from treadle.top import extra
from treadle.top.app import TopApp
from treadle.top.asking import LiveAsker
from treadle.top.text import CACHED, FREE, USED, cache_map, plain, rate, seconds, sparkline
from treadle.transport.codec import pack
from treadle.transport.messages import Abort, Live, Submit

from .faultkit import Faulty, faulty, params


class Asked:
    """What the application asks; `error` is raised instead, where there is one."""

    def __init__(self, f: Faulty) -> None:
        self._f = f
        self.error: ServerLost | None = None
        self.change: Callable[[Live], Live] = lambda live: live

    async def __call__(self) -> Live:
        if self.error is not None:
            raise self.error
        return self.change(self._f.service.live())


def screen(app: TopApp) -> str:
    """What is to be read on it."""
    lines: dict[float, list[str]] = {}
    for place, text in re.findall(r'<text [^>]*y="([\d.]+)"[^>]*>(.*?)</text>', app.export_screenshot()):
        lines.setdefault(float(place), []).append(html.unescape(text).replace("\xa0", " "))
    return "\n".join("".join(parts) for _, parts in sorted(lines.items()))


async def until(pilot: Pilot[int], condition: Callable[[], bool], what: str) -> None:
    for _ in range(1000):
        if condition():
            return
        await pilot.pause(0.02)
    raise AssertionError(f"{what}:\n{screen(pilot.app)}")  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_the_screen_shows_what_the_service_does_and_says_when_it_is_old(tmp_path: Path) -> None:
    async with faulty(tmp_path, pace=0.01, max_num_seqs=2) as f:
        for i, name in enumerate(("first-request", "second", "third")):
            message = Submit(id=name, tokens=pack([i + 1] * 20), params=params(i, 450), tenant=["ann", "", ""][i])
            f.service.submit(message, f.sink)
        await f.sink.begun("second", 2)
        asked = Asked(f)
        app = TopApp(asked, "ipc:///somewhere", 0.05)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: "first-re" in screen(app), "it came")
            shown, [ranks] = screen(app), [f.service.engine_pids]
            assert max(map(len, shown.splitlines())) <= 80
            assert "2 running, 1 waiting" in shown and "running 2 of 2  waiting 1" in shown
            for words in (r"0 +first-re +ann +decode +20 ", r"1 +second +– +decode +20 ", r"– +third +– +waiting +20 "):
                assert re.search(words, shown), f"{words} in\n{shown}"
            for rank, pid in enumerate(ranks):
                assert re.search(rf"{rank} (busy|ready) .* {pid}", shown), shown
            assert re.search(r"ttft +[\d.]+ m?s +[\d.]+ m?s +[\d.]+ m?s +2", shown) and "noneready" in shown
            assert "nothing has happened" in shown and USED in shown and FREE in shown
            await until(pilot, lambda: app.rates is not None and app.rates.generated > 0, "rates")
            assert app.live is not None and "tokens/s " in screen(app)
            used = f"{app.live.stats.blocks_used} used"
            await until(pilot, lambda: used in screen(app) or app.looks > 3, "blocks")

            await pilot.press("space")
            await until(pilot, lambda: "paused" in screen(app), "it says so")
            looks = app.looks
            await pilot.pause(0.2)
            assert app.looks <= looks + 1, "nobody is asked while it pauses"
            await pilot.press("space")

            asked.error = ServerLost("ipc:///somewhere: the server has ended")
            await until(pilot, lambda: "STALE for" in screen(app), "it says so")
            assert "ServerLost: ipc:///somewhere: the server has ended" in screen(app)
            assert "first-re" in screen(app) and app.screen.has_class("-stale"), "what was known stays, marked"
            asked.error = None
            await until(pilot, lambda: "STALE" not in screen(app), "it is there again")

            for name in ("first-request", "second", "third"):
                f.service.abort(Abort(name), f.sink)
            await until(pilot, lambda: "nothing runs and nothing waits" in screen(app), "empty")
            await pilot.press("q")
        assert app.return_code == 0


@pytest.mark.asyncio
async def test_a_wide_terminal_events_and_names_that_are_no_commands(tmp_path: Path) -> None:
    async with faulty(tmp_path, "1 5 exit", pace=0.01) as f:
        tenant = "\x1b]0;x\x07[b]y"
        f.service.submit(Submit(id="\x1b[2Jid", tokens=pack([1]), params=params(0, 450), tenant=tenant), f.sink)
        asked = Asked(f)
        app = TopApp(asked, "ipc:///x", 0.05)
        async with app.run_test(size=(180, 40)) as pilot:
            await until(pilot, lambda: "engine group 2 serves" in screen(app), "an event")
            shown = screen(app)
            assert app.screen.has_class("-wide") and "1 recovered" in shown
            assert re.search(r"lost engine group 1: rank 1, at step \d+: exit", shown)
            assert "?[2Jid" in shown and "?]0;x?[b" in shown and "\x1b" not in shown
            stuck = msgspec.structs.replace
            asked.change = lambda live: stuck(
                live,
                health=stuck(live.health, state="stuck", detail="ranks [1] have not answered"),
                ranks=[stuck(rank, state="late", step_age=7.0) for rank in live.ranks],
            )
            await until(pilot, lambda: "for 7.0 s" in screen(app), "health")
            assert "ranks [1] have not answered" in screen(app) and "stuck" in screen(app)
            await pilot.resize_terminal(80, 24)
            await until(pilot, lambda: app.screen.has_class("-narrow"), "narrow")
            assert max(map(len, screen(app).splitlines())) <= 80


@pytest.mark.asyncio
async def test_asking_goes_on_where_a_server_goes_and_comes_back(tmp_path: Path) -> None:
    async with faulty(tmp_path) as f:
        assert f.service._runtime is not None
        endpoint = f"ipc://{f.service._runtime.path}/clients.ipc"
        asker = LiveAsker(endpoint, None, None, 5.0)
        with pytest.raises(ServerLost):
            await asker.ask()
        for comes_back in (False, True):
            server = ClientServer(f.service, endpoint)
            try:
                assert (await asker.ask()).incarnation == f.service.incarnation
                assert (await asker.ask()).stats == f.service.stats()
            finally:
                server.close()
            if not comes_back:
                with pytest.raises(ServerLost):
                    await asker.ask()
        await asker.close()


def watched(endpoint: str) -> tuple[int, bytes]:
    """`treadle top` in a terminal, until it shows a service and q is pressed: its exit code, and what it wrote."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        os.execv(sys.executable, [sys.executable, "-m", "treadle", "top", "--endpoint", endpoint])
    seen = b""
    while True:
        try:
            news = os.read(terminal, 65536)
        except OSError:  # Linux's word for the end of a terminal
            break
        seen += news
        if b"nothing has happened" in seen and news:
            os.write(terminal, b"q")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen


@pytest.mark.asyncio
async def test_the_program_in_a_terminal_shows_a_service_and_quits(tmp_path: Path) -> None:
    async with faulty(tmp_path) as f:
        assert f.service._runtime is not None
        endpoint = f"ipc://{f.service._runtime.path}/clients.ipc"
        server = ClientServer(f.service, endpoint)
        try:
            code, seen = await asyncio.to_thread(watched, endpoint)
        finally:
            server.close()
    assert code == 0 and b"Traceback" not in seen


def test_where_nobody_answers_it_says_so_and_ends(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["top", "--endpoint", f"ipc://{runtime}/nobody.ipc"]) == 2
    assert "ServerLost" in (said := capsys.readouterr().err) and "no server runs" in said
    silent = runtime / "silent.ipc"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(silent))
        listening.listen()
        assert commands.run(["top", "--endpoint", f"ipc://{silent}", "--connect-timeout", "0.2"]) == 2
    assert "no answer within 0.2 s" in capsys.readouterr().err
    assert not logging.root.manager.disable


def test_what_is_wrong_is_said_before_the_screen_is_taken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commands.run(["top", "--interval", "0"]) == 2
    assert "--interval 0.0: allowed is 0.2 to 60 seconds" in capsys.readouterr().err
    assert commands.run(["top", "--endpoint", "http://x"]) == 2
    assert "ConfigError" in capsys.readouterr().err
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    assert commands.run(["top"]) == 2
    assert "pip install 'treadle[top]'" in capsys.readouterr().err


def test_numbers_as_people_read_them() -> None:
    values = (0.0, 0.0042, 0.32, 1.31, 75.2, 720.0, 11_000.0)
    assert [seconds(value) for value in values] == ["0.0 ms", "4.2 ms", "320 ms", "1.3 s", "75 s", "12 min", "3.1 h"]
    assert [rate(value) for value in (0.0, 3.21, 81.4, 12_345.6)] == ["0", "3.2", "81", "12,346"]
    assert sparkline([0, 1, 2, 4, 8], 4) == "▂▃▅█" and sparkline([0, 0], 9) == "▁▁" and sparkline([], 3) == ""
    assert plain("a\x1b\n\u202eb") == "a???b"


@given(st.binary(max_size=1024), st.integers(0, 90), st.integers(0, 8))
def test_the_map_fits_and_misses_no_cell(cells: bytes, width: int, height: int) -> None:
    lines = cache_map(cells, width, height)
    assert len(lines) <= height and all(len(line) <= width for line in lines)
    assert len("".join(lines)) == min(width * height, len(cells))
    if len(cells) <= width * height:
        assert all((mark == FREE) == (cell == 0) for mark, cell in zip("".join(lines), cells, strict=True) if cell < 1)


def test_the_map_shows_what_most_blocks_are() -> None:
    assert cache_map(bytes([0xF0] * 4 + [0x0F] * 4 + [0] * 4), 3, 1) == [USED + CACHED + FREE]
    assert cache_map(bytes([0xF0, 0x0F, 0]), 2, 2) == [USED + CACHED, FREE]
