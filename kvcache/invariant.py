"""The error of `check()` methods: a promise that the code makes to itself is broken."""

from __future__ import annotations


class CoreInvariantError(AssertionError):
    """A bug in this package, never a caller's mistake; the message says which promise and where."""


def require(condition: object, message: str) -> None:
    """Raises CoreInvariantError with `message` when `condition` is false. For check() methods, and where a
    broken promise would keep a loop running."""
    if not condition:
        raise CoreInvariantError(message)
