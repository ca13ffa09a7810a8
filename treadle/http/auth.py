"""API keys: who may ask, and on whose account."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path

from .errors import ApiError
from .settings import read_key_file

KEYS_VARIABLE = "TREADLE_API_KEYS"


class ApiKeys:
    """Keeps digests, not keys, and compares with all of them in constant time, so that time tells nothing about any.

    keys: each with the tenant on whose account its requests are, "" for none.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._tenants = [(_digest(key), tenant) for key, tenant in keys.items()]

    @classmethod
    def load(cls, file: str | None) -> ApiKeys:
        """Keys of a file and of the environment variable TREADLE_API_KEYS (separated by commas or spaces)."""
        keys = dict.fromkeys(os.environ.get(KEYS_VARIABLE, "").replace(",", " ").split(), "")
        return cls(keys | (read_key_file(Path(file)) if file is not None else {}))

    def __bool__(self) -> bool:
        """False when anybody may ask."""
        return bool(self._tenants)

    def check(self, authorization: str) -> str:
        """The tenant of a key. authorization: the header, "Bearer KEY". Raises ApiError with 401."""
        if not self._tenants:
            return ""
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _denied("an API key is needed, in a header Authorization: Bearer KEY")
        digest = _digest(key.strip())
        found = [tenant for known, tenant in self._tenants if hmac.compare_digest(digest, known)]
        if not found:
            raise _denied("this API key is not one of the server's")
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _denied(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")
