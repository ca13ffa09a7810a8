"""The packages that the gateway needs beyond those of Treadle."""

from __future__ import annotations

from importlib.util import find_spec

from treadle.errors import ConfigError

_NEEDED = ("starlette", "uvicorn", "httptools", "prometheus_client")


def check_extra() -> None:
    """Raises ConfigError, which names the pip command, when a package of the extra is not installed."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the HTTP gateway needs {', '.join(missing)}: pip install 'treadle[http]'")
