"""Directories that a service left behind, which was killed together with its ranks: the next one clears them away.

Whoever uses a directory holds a lock on a file in it, which the kernel lets go when the process ends, whatever ends it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

_PREFIX = "treadle-"
_LOCK = "lock"


def make(base: Path) -> tuple[Path, int]:
    """A directory in `base` that is in use until the descriptor is closed. Raises OSError."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        try:
            lock = _claim(path / _LOCK)
        except OSError:
            with suppress(OSError):  # not by rmtree, which needs a descriptor: there may be none
                (path / _LOCK).unlink(missing_ok=True)
                path.rmdir()
            raise
        if lock is not None:
            return path, lock


def _claim(path: Path) -> int | None:
    """Makes the lock and holds it. None: somebody clears up, and took the directory for left behind in this moment."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.lstat()):  # else it is removed, and we hold what nobody finds
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def clear(base: Path) -> None:
    """Removes what is ours, was claimed, and is in use no more; the rest is left alone, and so is what cannot be."""
    try:
        found = [entry.path for entry in os.scandir(base) if entry.name.startswith(_PREFIX)]
    except OSError:
        return
    for path in map(Path, found):
        try:
            info = path.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
                continue
            lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # never claimed, or gone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue  # in use
        finally:
            os.close(lock)
