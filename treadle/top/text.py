"""Numbers and names as a terminal shows them. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

_BARS = "▁▂▃▄▅▆▇█"
FREE, CACHED, USED = "·", "▒", "█"


def plain(text: str) -> str:
    """What somebody else wrote, with nothing in it that a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)


def seconds(value: float) -> str:
    """4.2 ms, 320 ms, 1.3 s, 75 s, 12 min, 3.1 h."""
    if value < 0.01:
        return f"{value * 1e3:.1f} ms"
    if value < 1.0:
        return f"{value * 1e3:.0f} ms"
    if value < 10.0:
        return f"{value:.1f} s"
    if value < 120.0:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def rate(value: float) -> str:
    """Exact while it is small: 0, 3.2, 81, 12,345."""
    return f"{value:.1f}" if 0 < value < 10 else f"{value:,.0f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values, from nothing to the highest of them."""
    shown = list(values)[-width:] if width > 0 else []
    most = max(shown, default=0.0)
    if most <= 0:
        return _BARS[0] * len(shown)
    return "".join(_BARS[min(7, int(8 * value / most))] for value in shown)


def cache_map(cells: bytes, width: int, height: int) -> list[str]:
    """`cells` as `Live.blocks` has them, in lines of `width` characters; where one character stands for several cells
    it shows what most of them are, and owned blocks before cached ones before free ones when it is close."""
    room = width * height
    if not cells or room <= 0:
        return []
    count = min(room, len(cells))
    marks = "".join(_mark(cells[len(cells) * i // count : len(cells) * (i + 1) // count]) for i in range(count))
    return [marks[start : start + width] for start in range(0, count, width)]


def _mark(cells: bytes) -> str:
    used, cached = sum(cell >> 4 for cell in cells), sum(cell & 15 for cell in cells)
    free = max(0, 15 * len(cells) - used - cached)
    most = max(used, cached, free)
    return USED if used == most else CACHED if cached == most else FREE
