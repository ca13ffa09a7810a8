"""What the commands end with, for scripts; the text is a part of each command's help."""

from __future__ import annotations

from collections.abc import Mapping

HEALTH: Mapping[str, int] = {
    "ready": 0,
    "degraded": 3,
    "stuck": 4,
    "draining": 5,
    "starting": 6,
    "failed": 7,
    "closed": 7,
}
"""Of `treadle health`, by state; a state that is not here is 7, too."""
_DONE = {0: "done", 2: "an error, said in one line on standard error", 130: "Ctrl-C"}
_OWN: Mapping[str, Mapping[int, str]] = {
    "serve": {0: "ended in order", 1: "the engines could not be brought back", 2: "it could not start"},
    "gateway": {0: "ended in order", 2: "it could not start"},
    "health": {2: "nobody answers, or another error"},
    "top": {0: "q was pressed", 2: "nobody answers, or another error"},
    "replay": {0: "the same decisions", 1: "a difference, or a damaged file"},
    "bench serve": {1: "no request was completed"},
}


def exit_codes(command: str) -> str:
    """One line of help. command: its words after `treadle`."""
    codes = {**_DONE, **_OWN.get(command, {})}
    if command == "health":
        codes |= {code: " or ".join(s for s, c in HEALTH.items() if c == code) for code in HEALTH.values()}
    return "Exit codes: " + "; ".join(f"{code} {codes[code]}" for code in sorted(codes)) + "."
