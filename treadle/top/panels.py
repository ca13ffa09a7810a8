"""What each panel of `treadle top` says, from one look at the service. Pure functions; no terminal is needed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from treadle.live_rates import Rates
from treadle.transport.messages import Live, LiveEvent, LiveLatency, LiveRank, LiveRow

from .text import CACHED, FREE, USED, cache_map, plain, rate, seconds, sparkline

GOOD, BAD, WARN, QUIET, STRONG = "green", "bold red", "yellow", "dim", "bold"
_STATES = {"ready": GOOD, "busy": GOOD, "decode": GOOD, "prefill": "cyan", "starting": WARN, "draining": WARN}
_STATES |= {"degraded": WARN, "restarting": WARN, "preempted": WARN, "waiting": QUIET}
_MARKS = {USED: "cyan", CACHED: "blue", FREE: QUIET}
_HEADINGS = ("row", "request", "tenant", "state", "prompt", "computed", "output", "of", "age")
_WIDTHS = (4, 11, 9, 10, 7, 9, 7, 7, 8)


def headline(live: Live) -> Text:
    state = live.health.state
    text = Text.assemble((" treadle ", "reverse"), " ", (plain(live.model), STRONG), "  ", (state, style(state)))
    text.append(f"  step {live.stats.step:,}", QUIET)
    if live.stats.recoveries:
        text.append(f"  {live.stats.recoveries} recovered", WARN)
    if live.health.detail:
        text.append(f"  {plain(live.health.detail)}", WARN)
    return text


def load(live: Live, now: Rates | None, history: Sequence[float], width: int) -> Text:
    stats = live.stats
    out, taken, ended = ("–", "–", "–") if now is None else map(rate, (now.generated, now.prompt, now.requests))
    text = Text.assemble("tokens/s ", (f"{out} out", STRONG), f"  {taken} in  {ended} requests/s\n")
    text.append(sparkline(history, width), "cyan")
    text.append(f"\nrunning {stats.running} of {live.max_rows}  waiting {stats.waiting:,}")
    text.append(f"\nfinished {stats.finished:,}  refused {stats.refused:,}  preempted {stats.preemptions:,}")
    return text


def latency(live: Live) -> Text:
    """36 columns."""
    text = Text().append("           p50     p90     p99     of", QUIET)
    for name, found in (("ttft", live.ttft), ("tpot", live.tpot), ("queue", live.wait)):
        text.append("\n").append_text(_latency(name, found))
    return text


def _latency(name: str, found: LiveLatency) -> Text:
    if not found.count:
        return Text(f"{name:6}{'–':>8}{'–':>8}{'–':>8}{0:>6}", QUIET)
    values = "".join(f"{seconds(value):>8}" for value in (found.p50, found.p90, found.p99))
    return Text(f"{name:6}{values}{found.count:>6,}")


def cache(live: Live, width: int, height: int) -> Text:
    """The picture and, in the last line, what its marks mean."""
    text = Text()
    for line in cache_map(live.blocks, width, height - 1):
        for mark in line:
            text.append(mark, _MARKS[mark])
        text.append("\n")
    stats = live.stats
    free = stats.blocks_total - stats.blocks_used - stats.blocks_cached
    for mark, count, name in ((USED, stats.blocks_used, "used"), (CACHED, stats.blocks_cached, "cached")):
        text.append(mark, _MARKS[mark]).append(f" {count:,} {name}  ")
    text.append(FREE, QUIET).append(f" {free:,} free")
    return text


def ranks(live: Live) -> Text:
    """36 columns."""
    text = Text().append("   state         step     ms     pid", QUIET)
    for rank in live.ranks:
        text.append("\n").append_text(_rank(rank))
    return text.append(f"\nspare group: {live.health.spare}", QUIET) if live.health.spare else text


def _rank(rank: LiveRank) -> Text:
    step, took = (f"{rank.step:,}", f"{rank.step_ms:.1f}") if rank.step >= 0 else ("–", "–")
    text = Text.assemble(f"{rank.rank:>2} ", (f"{rank.state:10}", style(rank.state)), f"{step:>8}")
    if rank.step_age >= 1.0:
        return text.append(f"  for {seconds(rank.step_age)}", WARN)
    return text.append(f"{took:>7}").append(f"{rank.pid or '–':>8}", QUIET)


def table_head() -> Text:
    return Text(_columns(_HEADINGS), QUIET)


def table(live: Live) -> Text:
    """Rows that run in order of age, then the head of the queue."""
    running = sorted(live.rows, key=lambda row: -row.age)
    text = Text("\n").join([_row(row) for row in (*running, *live.queue)])
    unseen = live.stats.running + live.stats.waiting - len(live.rows) - len(live.queue)
    if unseen > 0:
        text.append(f"\n… and {unseen:,} more", QUIET)
    return text if text else Text("nothing runs and nothing waits", QUIET)


def _row(row: LiveRow) -> Text:
    name = (row.id or "–") + (f"[{row.index}]" if row.index else "")
    place = "–" if row.row < 0 else str(row.row)
    sizes = (f"{number:,}" for number in (row.prompt, row.computed, row.output, row.limit - row.prompt))
    cells = (place, plain(name), plain(row.tenant)[:8] or "–", row.state, *sizes, seconds(row.age))
    text = Text(_columns(cells))
    start = sum(_WIDTHS[:3])
    text.stylize(style(row.state), start, start + len(row.state))
    return text


def _columns(cells: Sequence[str]) -> str:
    words = [f"{cell:<{width}}" for cell, width in zip(cells[:4], _WIDTHS[:4], strict=True)]
    return "".join([*words, *(f"{cell:>{width}}" for cell, width in zip(cells[4:], _WIDTHS[4:], strict=True))])


def events(live: Live) -> Text:
    """The newest first."""
    lines = [_event(event) for event in sorted(live.events, key=lambda event: event.ago)]
    return Text("\n").join(lines) if lines else Text("nothing has happened", QUIET)


def _event(event: LiveEvent) -> Text:
    bad = event.kind in ("lost", "gave up", "dump")
    text = Text.assemble((f"{seconds(event.ago):>7} ago  ", QUIET), (event.kind, BAD if bad else STRONG))
    text.append(f" {plain(event.text)}" + (f", {event.count:,} times" if event.count > 1 else ""))
    return text.append(f": {plain(event.detail)}", QUIET) if event.detail else text


def style(state: str) -> str:
    return _STATES.get(state, BAD)
