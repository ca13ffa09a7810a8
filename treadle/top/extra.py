"""The package that `treadle top` needs beyond those of Treadle."""

from __future__ import annotations

from importlib.util import find_spec

from treadle.errors import ConfigError


def check_extra() -> None:
    """Raises ConfigError, which names the pip command, when it is not installed."""
    if find_spec("textual") is None:
        raise ConfigError("treadle top needs textual: pip install 'treadle[top]'")
