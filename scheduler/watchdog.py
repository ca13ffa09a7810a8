"""The dump: everything that a person needs who asks why nothing moves, in one file.

It holds stacks, plans in numbers, rows and queue; no prompt, no token, no parameter of a request. The last few are
kept after the service has ended, readable by their owner only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from treadle.errors import ConfigError

logger = logging.getLogger("treadle")
_KEPT = 8
Section = tuple[str, list[str]]


def dump_directory(chosen: str) -> Path:
    """Where dumps go: `chosen`, or "" for `$XDG_STATE_HOME/treadle`, which is `~/.local/state/treadle` by default."""
    if chosen:
        return Path(chosen)
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state") / "treadle"


def write_dump(directory: Path, reason: str, sections: Sequence[Section]) -> Path:
    """Writes one file and removes all but the last few. Raises ConfigError where nothing can be written."""
    name = f"dump-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{time.monotonic_ns() % 1_000_000:06d}.txt"
    text = [f"treadle dump, {time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {os.getpid()}: {reason}"]
    for title, lines in sections:
        text += ["", f"== {title}", *lines]
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = directory / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", errors="replace") as file:
            file.write("\n".join(text) + "\n")
    except OSError as error:
        raise ConfigError(f"dump_dir {directory}: {error.strerror or error}") from error
    _keep_few(directory)
    return path


def _keep_few(directory: Path) -> None:
    """Others clear up here, too: what is gone before we look is no error, nor is what cannot be removed."""
    dated: list[tuple[float, Path]] = []
    for file in directory.glob("dump-*.txt"):
        with suppress(OSError):
            dated.append((file.stat().st_mtime, file))
    for _, old in sorted(dated)[:-_KEPT]:
        with suppress(OSError):
            old.unlink()


async def leave_dump(chosen: str, reason: str, sections: Sequence[Section]) -> None:
    """Writes a dump and logs where it is. chosen: see `dump_directory`."""
    try:
        path = await asyncio.to_thread(write_dump, dump_directory(chosen), reason, sections)
    except ConfigError as error:
        logger.error("no dump of what happened (%s): %s", reason, error)
        return
    logger.warning("%s: dump in %s", reason, path)


class Dumps:
    """Dumps being written, on one loop. directory: see `dump_directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()

    def leave(self, reason: str, sections: Callable[[], Awaitable[Sequence[Section]]]) -> asyncio.Task[None]:
        """Asks for the sections and writes them, meanwhile."""
        task = asyncio.get_running_loop().create_task(self._leave(reason, sections), name="treadle-dump")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _leave(self, reason: str, sections: Callable[[], Awaitable[Sequence[Section]]]) -> None:
        await leave_dump(self._directory, reason, await sections())

    async def wait(self) -> None:
        """Until all of them have ended."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


def own_stacks() -> list[str]:
    """Of every thread of this process and of every task of the running loop."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines: list[str] = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, '?')}")
        lines += [line.rstrip() for line in traceback.format_stack(frame)]
    for task in asyncio.all_tasks():
        lines.append(f"task {task.get_name()}")
        for frame in task.get_stack(limit=8):
            lines.append(f"  {frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}")
    return lines


def process_state(pid: int) -> str:
    """What the kernel says of a process: running, sleeping, stopped, in a driver, gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "gone"
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    try:
        waits_in = Path(f"/proc/{pid}/wchan").read_text() or "0"
    except OSError:
        waits_in = "?"
    wanted = {"state": "State", "memory": "VmRSS", "threads": "Threads"}
    shown = ", ".join(f"{name} {fields.get(key, '?').strip()}" for name, key in wanted.items())
    return f"{shown}, kernel function {waits_in}"
