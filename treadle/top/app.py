"""The terminal application."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical, VerticalScroll
from textual.widgets import Footer, Static

from treadle.errors import TreadleError
from treadle.live_rates import Rates, rates
from treadle.transport.messages import Live

from . import panels
from .text import plain, seconds

_HISTORY = 300
_CSS = """
Screen { layout: vertical; }
#head { height: 1; }
#stale { height: 1; display: none; background: $error; color: $text; text-style: bold; }
Screen.-stale #stale { display: block; }
Screen.-stale #body { opacity: 45%; }
#body { height: 1fr; }
#panels { grid-size: 2 2; grid-rows: 5 5; height: 10; }
.panel { border-top: solid $surface-lighten-3; border-title-color: $text-muted; padding: 0 1; height: 100%; }
#ranks { overflow-y: auto; scrollbar-size-vertical: 1; }
#lists { height: 1fr; layout: vertical; }
#rows { height: 1fr; min-height: 4; }
#rows-body { height: 1fr; scrollbar-size-vertical: 1; }
#events { height: 3; overflow-y: auto; scrollbar-size-vertical: 1; }
.-wide #panels { grid-size: 4 1; grid-rows: 9; height: 9; }
.-wide #lists { layout: horizontal; }
.-wide #rows { width: 82; }
.-wide #rows, .-wide #events { height: 100%; }
.-wide #events { width: 1fr; }
"""


class TopApp(App[int]):
    """Shows what `ask` answers, once in `interval` seconds, until q is pressed. ask: raises TreadleError.

    where: to say what is asked. looks: answers so far. What is shown after a failure is marked as stale.
    """

    CSS = _CSS
    TITLE = "treadle top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("space", "pause", "Pause"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (160, "-wide")]  # noqa: RUF012  # it is no ClassVar in the base class

    def __init__(self, ask: Callable[[], Awaitable[Live]], where: str, interval: float = 1.0) -> None:
        super().__init__()
        self.looks = 0
        self.live: Live | None = None
        self.rates: Rates | None = None
        self.error = ""
        self._ask = ask
        self._where = where
        self._interval = interval
        self._seen_at = time.monotonic()
        self._history: deque[float] = deque(maxlen=_HISTORY)
        self._paused = False

    def compose(self) -> ComposeResult:
        yield Static(f" treadle  connecting to {self._where}", id="head")
        yield Static(id="stale")
        with Vertical(id="body"):
            with Grid(id="panels"):
                yield _panel("load", "load")
                yield _panel("latency", "latency, last minute")
                yield _panel("cache", "cache")
                yield _panel("ranks", "ranks")
            with Vertical(id="lists"):
                with Vertical(id="rows", classes="panel") as rows:
                    rows.border_title = "requests"
                    yield Static(panels.table_head(), id="rows-head")
                    with VerticalScroll(id="rows-body"):
                        yield Static(id="rows-text")
                yield _panel("events", "events")
        yield Footer()

    def on_mount(self) -> None:
        self.run_worker(self._poll(), exclusive=True)

    def on_resize(self) -> None:
        self.call_after_refresh(self.show)

    def action_pause(self) -> None:
        self._paused = not self._paused
        self.show()

    async def _poll(self) -> None:
        while True:
            if not self._paused:
                await self._look()
            self.show()
            await asyncio.sleep(self._interval)

    async def _look(self) -> None:
        try:
            live = await self._ask()
        except TreadleError as error:
            self.error = f"{type(error).__name__}: {error}"
            return
        if self.live is not None and live.incarnation != self.live.incarnation:
            self._history.clear()
        self.rates = rates(self.live, live)
        if self.rates is not None:
            self._history.append(self.rates.generated)
        self.live, self.error, self._seen_at = live, "", time.monotonic()
        self.looks += 1

    def show(self) -> None:
        """Draws what is known, and how old it is when it is not the present."""
        if not self.query("#stale"):
            return  # the screen is being taken down
        self.screen.set_class(bool(self.error), "-stale")
        age = time.monotonic() - self._seen_at
        what = "STALE" if self.live is not None else "NO ANSWER"
        self._set("stale", Text(f" {what} for {seconds(age)}: {plain(self.error)}"))
        live = self.live
        if live is None:
            return
        head = panels.headline(live)
        if self._paused:
            head.append(f"  paused {seconds(age)} ago", panels.WARN)
        self._set("head", head)
        self._set("load", panels.load(live, self.rates, self._history, self._room("load")[0]))
        self._set("latency", panels.latency(live))
        self._set("cache", panels.cache(live, *self._room("cache")))
        self._set("ranks", panels.ranks(live))
        self._set("rows-text", panels.table(live))
        self._set("events", panels.events(live))
        self.query_one("#cache").border_title = f"cache, {live.stats.hit_rate:.0%} of prompt tokens found in it"
        self.query_one("#rows").border_title = f"{live.stats.running:,} running, {live.stats.waiting:,} waiting"

    def _set(self, name: str, text: Text) -> None:
        self.query_one(f"#{name}", Static).update(text)

    def _room(self, name: str) -> tuple[int, int]:
        """Columns and lines that a panel has for text."""
        size = self.query_one(f"#{name}").content_size
        return size.width, size.height


def _panel(name: str, title: str) -> Static:
    panel = Static(id=name, classes="panel")
    panel.border_title = title
    return panel
