"""Whether what is written later can be: tried at the start, when somebody is there to hear that it cannot."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from treadle.errors import ConfigError


def check_directory(option: str, directory: Path) -> None:
    """Makes it where it is not there, for its owner alone. Raises ConfigError that names the option; leaves no file."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"{option}={str(directory)!r}: it is there and is no directory") from error
    except (OSError, ValueError) as error:
        raise _cannot(option, directory, error) from error
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:
        raise _cannot(option, directory, error) from error


def check_file(option: str, path: Path) -> None:
    """The same of a file and its directory; a file that is there is not changed."""
    if path.parent.exists() and not path.parent.is_dir():
        raise ConfigError(f"{option}={str(path)!r}: {path.parent} is no directory")
    check_directory(option, path.parent)
    if path.exists() and not path.is_file():  # to open a pipe may wait for ever
        raise ConfigError(f"{option}={str(path)!r}: it is no regular file")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise _cannot(option, path, error) from error


def _cannot(option: str, path: Path, error: OSError | ValueError) -> ConfigError:
    why = error.strerror if isinstance(error, OSError) else None
    return ConfigError(f"{option}={str(path)!r}: it cannot be written: {why or error}")
