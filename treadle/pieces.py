"""The bytes that a token stands for.

Every tokenizer of this family writes text as a concatenation of bytes, token by token; knowing them makes decoding
incremental and exact: bytes go through one UTF-8 decoder, whatever way they are cut into tokens and messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from treadle.errors import UnsupportedModel


class Pieces:
    """Token id to bytes, for a `tokenizers.Tokenizer`.

    Understands the two decoders that Llama-family models have: byte-level (GPT-2's printable stand-ins for bytes) and
    SentencePiece's ("▁" for a space, "<0x0A>" for a byte). Raises UnsupportedModel for any other.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        steps = _decoder_steps(backend)
        self._byte_level = any(step["type"] == "ByteLevel" for step in steps)
        self._space = "▁"
        # SentencePiece puts a space before the first word and takes it away again when it decodes.
        self.strips_first_space = False
        for step in steps:
            self._understand(step)
        self._alphabet = _byte_alphabet()
        self._cache: dict[int, bytes] = {}
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)

    def piece(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """b"" for a special token that is skipped, and for an id that the vocabulary does not have."""
        if skip_special_tokens and token_id in self._special:
            return b""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._make(token_id)
        return known

    def join(self, token_ids: Iterable[int], skip_special_tokens: bool) -> bytes:
        """The bytes of a whole text."""
        data = b"".join([self.piece(id, skip_special_tokens) for id in token_ids])
        return data[1:] if self.strips_first_space and data[:1] == b" " else data

    def tail(self, token_ids: Sequence[int], skip_special_tokens: bool, length: int) -> bytes:
        """At least the last `length` bytes of a text, found from its end; all of it where it is shorter."""
        data = b""
        for token_id in reversed(token_ids):
            data = self.piece(token_id, skip_special_tokens) + data
            if len(data) >= length:
                break
        return data

    def _understand(self, step: dict[str, Any]) -> None:
        kind = step["type"]
        if kind in ("ByteLevel", "ByteFallback", "Fuse"):
            return
        if kind == "Replace" and step.get("content") == " " and isinstance(step.get("pattern"), dict):
            self._space = str(step["pattern"].get("String", self._space))
        elif kind == "Strip" and step.get("content") == " " and step.get("start") == 1 and not step.get("stop"):
            self.strips_first_space = True
        elif kind == "Metaspace":
            self._space = str(step.get("replacement", self._space))
            self.strips_first_space = step.get("prepend_scheme", "always") != "never"
        else:
            raise UnsupportedModel(
                f"the tokenizer's decoder {kind!r} is not supported; "
                "supported are byte-level and SentencePiece decoders"
            )

    def _make(self, token_id: int) -> bytes:
        if token_id < 0 or token_id >> 32:
            return b""
        token: str | None = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            try:
                return bytes([self._alphabet[char] for char in token])
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes.fromhex(token[3:5])
            except ValueError:
                pass
        return token.replace(self._space, " ").encode()


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    if backend.decoder is None:
        raise UnsupportedModel("the tokenizer has no decoder; supported are byte-level and SentencePiece decoders")
    state: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's code: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
