"""How a `tokenizer.json` spells bytes, said so that llguidance cannot take it for something else."""

from __future__ import annotations

import msgspec


def plain_decoder(tokenizer_json: str) -> str:
    """The same tokenizer, with a decoder that is a chain and has ByteLevel in it made ByteLevel alone.

    Where ByteLevel ends the chain, every character of a token stands for a byte (GPT-2's alphabet), and what other
    links look for, "▁" and "<0x0A>", does not occur. llguidance goes by the first link that it knows: after a
    ByteFallback it takes these characters for themselves, so "Ä" for two bytes of UTF-8 and not for one byte 0xC4. Its
    masks then allow what its parser refuses. A text that is no such JSON is returned as it is, for llguidance to judge.
    """
    try:
        parts = msgspec.json.decode(tokenizer_json, type=dict[str, msgspec.Raw])
        level = _byte_level(msgspec.json.decode(parts["decoder"]))
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError, KeyError):
        return tokenizer_json
    if level is None:
        return tokenizer_json
    parts["decoder"] = msgspec.Raw(msgspec.json.encode(level))
    return msgspec.json.encode(parts).decode()


def _byte_level(decoder: object) -> dict[str, object] | None:
    """The ByteLevel link of a chain."""
    links = decoder.get("decoders") if isinstance(decoder, dict) else None
    for link in links if isinstance(links, list) else ():
        if isinstance(link, dict) and link.get("type") == "ByteLevel":
            return link
    return None
