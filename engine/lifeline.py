"""A rank must not outlive its parent, however the parent ends.

The parent holds the write end of a pipe and nobody else does; when it goes, `kill -9` included, the read end gives
end-of-file. A thread waits for that. A fork of the parent's program may hold a copy of the write end, so the thread
also looks now and then whether the parent still is the parent. It then removes what the parent can no longer remove.
"""

from __future__ import annotations

import os
import select
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

from treadle.transport.endpoints import remove_default_directory

ORPHANED = 3
_LOOK_SECONDS = 2.0


def watch(descriptor: int, leftovers: Sequence[Path]) -> None:
    """Ends this process with exit code 3 once `descriptor` closes, after removing the `leftovers`."""
    arguments = (descriptor, os.getppid(), {path: _inode(path) for path in leftovers})
    threading.Thread(target=_wait, args=arguments, name="lifeline", daemon=True).start()


def _wait(descriptor: int, parent: int, leftovers: dict[Path, int]) -> None:
    while os.getppid() == parent:
        readable, _, _ = select.select([descriptor], [], [], _LOOK_SECONDS)
        if readable and not os.read(descriptor, 1):
            break
    for path, inode in leftovers.items():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif _inode(path) == inode:  # else it is the file of a server that came after ours
            path.unlink(missing_ok=True)
            remove_default_directory(path)
    os._exit(ORPHANED)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return -1
