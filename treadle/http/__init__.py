"""The HTTP gateway: OpenAI's endpoints in front of an `LLM` or a `Client`.

Needs the extra `http`. Importing `treadle` imports nothing of it. Asking this package for `HttpServer` where the extra
is not installed raises ConfigError, which names the pip command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .settings import GatewaySettings

if TYPE_CHECKING:
    from .link import Link
    from .server import HttpServer

__all__ = ["GatewaySettings", "HttpServer", "Link"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'treadle.http' has no attribute {name!r}")
    from .extra import check_extra

    check_extra()
    if name == "Link":
        from .link import Link

        return Link
    from .server import HttpServer

    return HttpServer
