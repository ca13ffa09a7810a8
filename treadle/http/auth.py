"""API keys: who may ask."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from .errors import ApiError
from .settings import read_key_file

KEYS_VARIABLE = "TREADLE_API_KEYS"


class ApiKeys:
    """Keeps digests, not keys, and compares with all of them in constant time, so that time tells nothing about any."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    @classmethod
    def load(cls, file: str | None) -> ApiKeys:
        """Keys of a file and of the environment variable TREADLE_API_KEYS (separated by commas or spaces)."""
        keys = read_key_file(Path(file)) if file is not None else []
        return cls(keys + os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split())

    def __bool__(self) -> bool:
        """False when anybody may ask."""
        return bool(self._digests)

    def check(self, authorization: str) -> None:
        """authorization: the header, "Bearer KEY". Raises ApiError with 401."""
        if not self._digests:
            return
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _denied("an API key is needed, in a header Authorization: Bearer KEY")
        digest = _digest(key.strip())
        if sum(hmac.compare_digest(digest, known) for known in self._digests) == 0:
            raise _denied("this API key is not one of the server's")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _denied(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")
